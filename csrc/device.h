// Marks a function that runs on a GPU where nvcc compiles it, and is ordinary C++ elsewhere.
#pragma once

#ifdef __CUDACC__
#define FUSED_DEVICE __device__
#else
#define FUSED_DEVICE
#endif
