"""Prompts in, responses out.

`engine` is the interface, `decode` the decode loop that is used by default, `draw` the choice of one token,
`generate` transformers' own generation for families whose cache that loop cannot use, `vllm` a vLLM server:
`vllm_connection` asks it, `vllm_transport` sends it the weights (`vllm_weights`; `vllm_nccl` over NCCL), `vllm_check`
compares it with the trainer; `kept` keeps responses on disk, to which more can be added.
"""
