"""Policies over OpenAI's HTTP, with a chat page: for people, and for whatever program speaks to such servers.

`wire` reads requests, `pieces` writes answers. `app` is the server; what answers is `engine` (models in this process)
or `upstream` (another server). `policies` loads a run's policies, `scheduler` is the thread that owns them, `decoder`
its batch of rows, `cache` their keys and values, `text` their words. `feedback` is what people say of answers,
`keeping` what is kept of it, `scrub` what is taken out before. `config` holds the settings, `page` the chat page.
"""
