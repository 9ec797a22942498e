"""Serve a GGUF file with llama.cpp's server. Usage: python llama_server.py FILE PORT NAME"""

import sys
import time

import xllamacpp

settings = xllamacpp.CommonParams()
settings.model.path = sys.argv[1]
settings.hostnames = ["127.0.0.1"]
settings.port = int(sys.argv[2])
settings.model_alias = {sys.argv[3]}
settings.n_parallel, settings.n_ctx, settings.cpuparams.n_threads = 4, 8192, 2
server = xllamacpp.Server(settings)
print(server.listening_address, flush=True)
while True:
    time.sleep(60)
