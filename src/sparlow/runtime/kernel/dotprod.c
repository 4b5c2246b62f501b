/* NEON with SDOT: ARMv8.2 with the dot product, and all of 8.4 on (Cortex-A55 and A75, Neoverse, Apple M1 on). */
#define NAME path_dotprod
#define NEEDS_SDOT
#include "neon.c"
