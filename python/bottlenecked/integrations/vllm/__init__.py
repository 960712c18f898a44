"""vLLM: serve a model whose KV cache a Processor rewrites at every step's end. docs/vllm.md tells how.

    connector.py   what vLLM is told to load: the two halves behind vLLM's KV connector interface
    scheduler.py     the half beside vLLM's scheduler: whose step has ended, which blocks and query pages
    worker.py        the half in each worker: saves, restores, rewrites
    capture.py     the hook on the attention implementation, and the same as a named attention backend
    layout.py      vLLM's cache tensors as keys and values
    prompts.py     prompts that begin alike
    options.py     what the server and a request may set
    checks.py      what is refused at start
    metrics.py     what is counted, for the log and Prometheus
    serve.py       `bottlenecked serve`

Importing this package imports nothing of vLLM.
"""
