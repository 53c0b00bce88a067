"""Safety: what a policy allows, whether a model keeps to it, and what finds the places where it does not.

`policy` reads a usage policy and writes it for graders, guards and cards. `suite` reads sets of attacks and of harmless
prompts beside them, `refusals` says whether an answer refuses, `labels` measures that against people's labels and
corrects by it, `outcome` counts and `page` shows. `attacks` asks a model for new attacks and scores them, `diversity`
counts how many of them are different. `monitor` compares a server's log, which `logged` reads, with a reference, by the
statistics of `drift`, and `monitor_page` shows it.
"""
