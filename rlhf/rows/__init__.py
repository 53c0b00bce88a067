"""Rows of data, from whatever holds them to records of ours.

`sources` reads files, folders, hub names and lists, each row with its location; `files` and `jsonl` read one file.
`shapes` converts rows of the shapes in common use, `asked` finds a row's prompt, `foreign` names sets that are not read
as they are, and `messages` checks conversations. `records` holds what comes out: prompts, demonstrations and rankings,
and how they are written and split by prompt.
"""
