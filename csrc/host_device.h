// Marks functions that both the CPU and the CUDA operators call; nothing for a plain C++ compiler.
#pragma once

#if defined(__CUDACC__)
#define MIREPRO_HD __host__ __device__
#else
#define MIREPRO_HD
#endif
