"""Prompts in, responses out.

`engine` is the interface, `decode` the decode loop that is used by default, `draw` the choice of one token,
`generate` transformers' own generation for families whose cache that loop cannot use, `vllm` a vLLM server,
which `vllm_connection` reaches; `kept` keeps responses on disk, to which more can be added.
"""
