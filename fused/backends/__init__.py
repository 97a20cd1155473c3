"""What serves the operators: the C++ extension, Triton, CUDA C++; and which of them here."""
