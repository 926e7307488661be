// How the threads of a block take turns: `executor` runs `block`.
#pragma once

#ifdef SPARSE_ATTN_EMULATOR_THREADS
#include "host/threads.h"
#else
#include "host/fibers.h"
#endif
