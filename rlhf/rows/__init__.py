"""Rows of data, from whatever holds them to records of ours.

`sources` reads files, folders, hub names and lists, each row with its location; `files` and `jsonl` read one file,
`arrow` the rows of Arrow's tables. `fields` reads our own rows, in which `asked` finds the prompt, and `messages`
checks conversations. `shapes` is the table of the shapes that other sets have, with the functions of `comparisons`,
`conversations` and `exports`; `foreign` reads rows by it. `mixed` makes one source of several and maps columns.
`records` holds what comes out: prompts, demonstrations and rankings, and how they are written and split by prompt;
`bad_rows` counts what can't be used. `duplicates` finds texts that are nearly equal.
"""
