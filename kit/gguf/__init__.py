"""GGUF files: the formats, the header, conversion, llama.cpp in a child process, and its set-up."""
