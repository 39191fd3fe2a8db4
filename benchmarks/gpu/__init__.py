"""What the code does on a GPU: `bash benchmarks/gpu.sh`."""
