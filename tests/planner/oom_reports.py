"""Messages as people met them, each with the thread it was read on; only the message is quoted.

Those of `REPORTS` are as they stand there. In the logs below them the wording is a thread's, and
what was changed or added is said.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from snugpt.units import GIB, KIB, MIB


class Report(NamedTuple):
    """A message, what it says in bytes, and the cause that its numbers give."""

    text: str
    says: dict[str, Any]
    cause: str


REPORTS: dict[str, Report] = {
    # https://github.com/karpathy/nanoGPT/issues/88 (PyTorch 1.13 and 2.0 write this)
    "1.13": Report(
        "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 394.00 MiB (GPU 0;"
        " 15.78 GiB total capacity; 5.17 GiB already allocated; 8.68 GiB free; 5.25 GiB reserved in"
        " total by PyTorch) If reserved memory is >> allocated memory try setting"
        " max_split_size_mb to avoid fragmentation.  See documentation for Memory Management and"
        " PYTORCH_CUDA_ALLOC_CONF",
        {
            "backend": "cuda", "device": 0, "tried_bytes": 394 * MIB,
            "capacity_bytes": round(15.78 * GIB), "allocated_bytes": round(5.17 * GIB),
            "free_bytes": round(8.68 * GIB),
            "cached_bytes": round(5.25 * GIB) - round(5.17 * GIB), "others": (),
            "setting": "PYTORCH_CUDA_ALLOC_CONF=max_split_size_mb:512",
        },
        "unexplained",
    ),
    # https://github.com/chnsh/DCRNN_PyTorch/issues/6 (1.x; the form is that of 1.13)
    "1.13, fragmented": Report(
        "RuntimeError: CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; 5.80 GiB total"
        " capacity; 4.36 GiB already allocated; 6.69 MiB free; 4.63 GiB reserved in total by"
        " PyTorch)",
        {"tried_bytes": 20 * MIB, "free_bytes": round(6.69 * MIB)},
        "fragmented",
    ),
    # https://github.com/YingqianWang/iPASSR/issues/9
    "2.0 on Windows, spilled": Report(
        "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 10.73 GiB (GPU 0; 8.00"
        " GiB total capacity; 17.20 GiB already allocated; 0 bytes free; 19.15 GiB reserved in"
        " total by PyTorch) If reserved memory is >> allocated memory try setting"
        " max_split_size_mb to avoid fragmentation.",
        {"free_bytes": 0, "capacity_bytes": 8 * GIB, "allocated_bytes": round(17.2 * GIB)},
        "spilled",
    ),
    # https://github.com/huggingface/meshgen/issues/7
    "2.5 on Windows, spilled": Report(
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1002.00 MiB. GPU 0 has a"
        " total capacity of 8.00 GiB of which 0 bytes is free. Of the allocated memory 13.98 GiB is"
        " allocated by PyTorch, and 129.48 MiB is reserved by PyTorch but unallocated.",
        {"tried_bytes": 1002 * MIB, "free_bytes": 0},
        "spilled",
    ),
    # https://github.com/kerrj/lerf/issues/73 ("capacty" is PyTorch 2.1's and 2.2's)
    "2.1, fragmented": Report(
        "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 3.00 GiB. GPU 0 has a"
        " total capacty of 23.65 GiB of which 1.66 GiB is free. Including non-PyTorch memory, this"
        " process has 20.81 GiB memory in use. Of the allocated memory 12.09 GiB is allocated by"
        " PyTorch, and 4.84 GiB is reserved by PyTorch but unallocated. If reserved but unallocated"
        " memory is large try setting max_split_size_mb to avoid fragmentation.  See documentation"
        " for Memory Management and PYTORCH_CUDA_ALLOC_CONF",
        {
            "capacity_bytes": round(23.65 * GIB), "process_bytes": round(20.81 * GIB),
            "cached_bytes": round(4.84 * GIB),
            "setting": "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True",
        },
        "fragmented",
    ),
    # https://github.com/FoundationVision/GenerateU/issues/10: its own number is a container's
    "2.1, in a container": Report(
        "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 496.00 MiB. GPU 0 has a"
        " total capacty of 14.75 GiB of which 235.06 MiB is free. Process 20398 has 14.52 GiB"
        " memory in use. Of the allocated memory 14.06 GiB is allocated by PyTorch, and 330.42 MiB"
        " is reserved by PyTorch but unallocated.",
        {"process_bytes": round(14.52 * GIB), "others": (), "tried_bytes": 496 * MIB},
        "fragmented",
    ),
    # https://github.com/wxian3/NeuroLens/issues/2
    "2.1, larger than the card": Report(
        "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 55.57 GiB. GPU 0 has a"
        " total capacty of 12.00 GiB of which 9.02 GiB is free. Of the allocated memory 984.52 MiB"
        " is allocated by PyTorch, and 463.48 MiB is reserved by PyTorch but unallocated.",
        {"process_bytes": None, "allocated_bytes": round(984.52 * MIB)},
        "too_large",
    ),
    # https://github.com/pytorch/pytorch/issues/16417
    "2.3": Report(
        "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 22.00 MiB. GPU 0 has a"
        " total capacity of 23.65 GiB of which 11.06 MiB is free. Including non-PyTorch memory,"
        " this process has 23.60 GiB memory in use. Of the allocated memory 22.90 GiB is allocated"
        " by PyTorch, and 194.87 MiB is reserved by PyTorch but unallocated. If reserved but"
        " unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
        " to avoid fragmentation.",
        {"device": 0, "process_bytes": round(23.6 * GIB)},
        "fragmented",
    ),
    # https://github.com/QwenLM/Qwen2.5-Omni/issues/240
    "2.5, another process": Report(
        "CUDA out of memory. Tried to allocate 124.68 GiB. GPU 0 has a total capacity of 95.22 GiB"
        " of which 51.23 GiB is free. Process 608946 has 14.91 GiB memory in use. Process 734147"
        " has 29.07 GiB memory in use. Of the allocated memory 25.50 GiB is allocated by PyTorch,"
        " and 3.14 GiB is reserved by PyTorch but unallocated.",
        {"process_bytes": round(29.07 * GIB), "others_bytes": round(14.91 * GIB)},
        "too_large",
    ),
    # https://github.com/vllm-project/vllm/issues/9290
    "2.5, private pools": Report(
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 138.00 MiB. GPU 0 has a"
        " total capacity of 79.15 GiB of which 2.19 MiB is free. Including non-PyTorch memory, this"
        " process has 79.12 GiB memory in use. Of the allocated memory 71.57 GiB is allocated by"
        " PyTorch, with 39.77 MiB allocated in private pools (e.g., CUDA Graphs), and 611.60 MiB is"
        " reserved by PyTorch but unallocated.",
        {"allocated_bytes": round(71.57 * GIB), "cached_bytes": round(611.6 * MIB)},
        "fragmented",
    ),
    # https://github.com/murong-xu/CADS/issues/4
    "2.6, full": Report(
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 22.78 GiB. GPU 0 has a total"
        " capacity of 31.47 GiB of which 12.73 GiB is free. Including non-PyTorch memory, this"
        " process has 18.73 GiB memory in use. Of the allocated memory 9.08 GiB is allocated by"
        " PyTorch, and 9.35 GiB is reserved by PyTorch but unallocated.",
        {"tried_bytes": round(22.78 * GIB)},
        "full",
    ),
    # https://github.com/bytedance/X-Portrait/issues/7: 2.75 GiB that nobody names
    "2.5, others unnamed": Report(
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total"
        " capacity of 23.59 GiB of which 351.12 MiB is free. Including non-PyTorch memory, this"
        " process has 20.50 GiB memory in use. Of the allocated memory 20.02 GiB is allocated by"
        " PyTorch, and 187.61 MiB is reserved by PyTorch but unallocated.",
        {"process_bytes": round(20.5 * GIB), "others": ()},
        "others",
    ),
    # https://github.com/ROCm/TheRock/issues/2118: a limit that the program set itself
    "2.9 on ROCm, limited": Report(
        "torch.OutOfMemoryError: HIP out of memory. Tried to allocate 2.00 MiB. GPU 0 has a total"
        " capacity of 255.98 GiB of which 244.65 GiB is free. 1.05 GiB allowed; Of the allocated"
        " memory 1017.01 MiB is allocated by PyTorch, with 17.00 MiB allocated in private pools"
        " (e.g., HIP Graphs), and 54.99 MiB is reserved by PyTorch but unallocated. If reserved but"
        " unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True",
        {"backend": "hip", "limit_bytes": round(1.05 * GIB)},
        "limited",
    ),
    # https://github.com/Comfy-Org/ComfyUI/issues/9529
    "2.8 on ROCm": Report(
        "HIP out of memory. Tried to allocate 432.00 MiB. GPU 0 has a total capacity of 15.92 GiB"
        " of which 7.12 GiB is free. Of the allocated memory 8.08 GiB is allocated by PyTorch, and"
        " 321.96 MiB is reserved by PyTorch but unallocated. If reserved but unallocated memory is"
        " large try setting PYTORCH_HIP_ALLOC_CONF=expandable_segments:True to avoid"
        " fragmentation.",
        {"backend": "hip", "setting": "PYTORCH_HIP_ALLOC_CONF=expandable_segments:True"},
        "unexplained",
    ),
    # https://github.com/haoheliu/AudioLDM2/issues/20: "GB" that are GiB
    "Apple, in GB": Report(
        "RuntimeError: MPS backend out of memory (MPS allocated: 18.02 GB, other allocations:"
        " 107.10 MB, max allowed: 18.13 GB). Tried to allocate 4.50 MB on private pool. Use"
        " PYTORCH_MPS_HIGH_WATERMARK_RATIO=0.0 to disable upper limit for memory allocations (may"
        " cause system failure).",
        {
            "backend": "mps", "capacity_bytes": round(18.13 * GIB),
            "allocated_bytes": round(18.02 * GIB), "tried_bytes": round(4.5 * MIB),
            "process_bytes": round(18.02 * GIB) + round(107.1 * MIB),
        },
        "unexplained",
    ),
    # https://github.com/Comfy-Org/ComfyUI/issues/8984: the same, after the unit was mended
    "Apple, in GiB": Report(
        "MPS backend out of memory (MPS allocated: 15.72 GiB, other allocations: 2.41 MiB, max"
        " allowed: 18.13 GiB). Tried to allocate 5.81 GiB on private pool. Use"
        " PYTORCH_MPS_HIGH_WATERMARK_RATIO=0.0 to disable upper limit for memory allocations",
        {"backend": "mps", "capacity_bytes": round(18.13 * GIB), "tried_bytes": round(5.81 * GIB)},
        "full",
    ),
    # https://github.com/JingyunLiang/VRT/issues/49
    "CPU, Linux": Report(
        "RuntimeError: [enforce fail at alloc_cpu.cpp:73] . DefaultCPUAllocator: can't allocate"
        " memory: you tried to allocate 116813856768 bytes. Error code 12 (Cannot allocate memory)",
        {"backend": "cpu", "tried_bytes": 116813856768},
        "unknown",
    ),
    # https://github.com/lllyasviel/Fooocus/issues/237
    "CPU, Windows": Report(
        "RuntimeError: [enforce fail at ..\\c10\\core\\impl\\alloc_cpu.cpp:72] data."
        " DefaultCPUAllocator: not enough memory: you tried to allocate 26214400 bytes.",
        {"backend": "cpu", "tried_bytes": 25600 * KIB},
        "unknown",
    ),
    # https://github.com/nunchux-ai/nunchaku/issues/144
    "the driver's own": Report(
        "RuntimeError: CUDA error: out of memory",
        {"backend": "cuda", "tried_bytes": None, "capacity_bytes": None},
        "unknown",
    ),
}  # fmt: skip

# Rank 0's message is that of https://github.com/QwenLM/Qwen3-VL/issues/832 under the traceback of
# https://github.com/karpathy/nanoGPT/issues/391; rank 1 is made up. Mixed as torchrun mixes ranks
# and wrapped as a terminal wraps.
INTERLEAVED = """\
[rank0]: Traceback (most recent call last):
[rank1]: Traceback (most recent call last):
[rank0]:   File "/content/llama2.c/train.py", line 312, in <module>
[rank1]:   File "/content/llama2.c/train.py", line 300, in <module>
[rank0]:     scaler.scale(loss).backward()
[rank1]:     losses = estimate_loss()
[rank0]:   File "/usr/local/lib/python3.10/dist-packages/torch/_tensor.py", line 492, in backward
[rank0]:     torch.autograd.backward(
[rank1]:   File "/content/llama2.c/train.py", line 180, in estimate_loss
[rank0]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.88 GiB. GPU 0 has a
[rank1]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 0.50 GiB. GPU 1 has a
[rank0]: total capacity of 31.60 GiB of which 1.55 GiB is free. Process 613601 has 30.05 GiB
[rank1]: total capacity of 31.60 GiB of which 0.10 GiB is free. Process 613602 has 30.50 GiB
[rank0]: memory in use. Of the allocated memory 29.04 GiB is allocated by PyTorch, and 724.10 MiB
[rank1]: memory in use. Of the allocated memory 30.04 GiB is allocated by PyTorch, and 124.10 MiB
[rank0]: is reserved by PyTorch but unallocated.
[rank1]: is reserved by PyTorch but unallocated.
"""

# https://github.com/lzhxmu/CPPO/issues/6, of another rank
CHILD_FAILED = """\
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
train.py FAILED
------------------------------------------------------------
Failures:
  <NO_OTHER_FAILURES>
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2025-05-21_15:43:03
  host      : worker
  rank      : 3 (local_rank: 3)
  exitcode  : -9 (pid: 14750)
  error_file: <N/A>
  traceback : Signal 9 (SIGKILL) received by PID 14750
============================================================
"""

# https://github.com/XPixelGroup/BasicSR/issues/737; its rank 2 is called 3 here
TIMEOUT = """\
[rank1]:[E626 06:24:44.903881913 ProcessGroupNCCL.cpp:616] [Rank 1] Watchdog caught collective \
operation timeout: WorkNCCL(SeqNum=808, OpType=ALLREDUCE, NumelIn=9801523, NumelOut=9801523, \
Timeout(ms)=600000) ran for 600020 milliseconds before timing out.
[rank0]:[E626 06:24:44.159932949 ProcessGroupNCCL.cpp:616] [Rank 0] Watchdog caught collective \
operation timeout: WorkNCCL(SeqNum=808, OpType=ALLREDUCE, NumelIn=9801523, NumelOut=9801523, \
Timeout(ms)=600000) ran for 600030 milliseconds before timing out.
[rank3]:[E626 06:24:44.173078629 ProcessGroupNCCL.cpp:616] [Rank 3] Watchdog caught collective \
operation timeout: WorkNCCL(SeqNum=808, OpType=ALLREDUCE, NumelIn=9801523, NumelOut=9801523, \
Timeout(ms)=600000) ran for 600061 milliseconds before timing out.
"""

# https://github.com/karpathy/nanoGPT/issues/215, the command and four of its lines
NAN = """\
torchrun --standalone --nproc_per_node=1 train.py config/train_gpt2.py --dtype=float16
2023-03-22 09:32:32 step 3000: train loss 4.0390, val loss 4.0427
2023-03-22 09:32:41 iter 3000: loss 4.2490, time 35392.33ms, mfu 13.85%
2023-03-22 09:32:52 iter 3010: loss nan, time 1019.95ms, mfu 14.12%
2023-03-22 09:33:02 iter 3020: loss nan, time 1015.95ms, mfu 14.36%
"""

# https://github.com/karpathy/nn-zero-to-hero/issues/31; the traceback over it is made up
BACKWARD_TWICE = """\
Traceback (most recent call last):
  File "/home/me/makemore.py", line 42, in <module>
    loss.backward()
  File "/usr/lib/python3.11/site-packages/torch/_tensor.py", line 522, in backward
    torch.autograd.backward(
RuntimeError: Trying to backward through the graph a second time (or directly access saved \
tensors after they have already been freed). Saved intermediate values of the graph are freed when \
you call .backward() or autograd.grad(). Specify retain_graph=True if you need to backward through \
the graph a second time or if you need to access saved tensors after calling backward.
"""

# https://github.com/pytorch/pytorch/issues/52736, of another card
NO_KERNELS = """\
UserWarning: NVIDIA GeForce GTX 1070 with CUDA capability sm_61 is not compatible with the current \
PyTorch installation.
RuntimeError: CUDA error: no kernel image is available for execution on the device
"""

# The card, the batch and the failing buffer are those of
# https://github.com/karpathy/nanochat/issues/443; the lines are as nanochat of October 2025 prints.
NANOCHAT = """\
torchrun --standalone --nproc_per_node=8 -m scripts.base_train -- --depth=20 --run=d20
Overriding: depth = 20
Overriding: run = d20
Vocab size: 65,536
num_layers: 20
Tokens / micro-batch / rank: 32 x 2048 = 65,536
Tokens / micro-batch: 524,288
Total batch size 524,288 => gradient accumulation steps: 1
Number of parameters: 560,988,160
Step 00000 | Validation bpb: 3.3013
[rank2]: Traceback (most recent call last):
[rank2]:   File "/root/nanochat/scripts/base_train.py", line 300, in <module>
[rank2]:     loss.backward()
[rank2]:   File "/tmp/torchinductor_me/ab/c45x.py", line 5269, in call
[rank2]:     buf706 = empty_strided_cuda((65536, 65536), (65536, 1), torch.bfloat16)
[rank2]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 8.00 GiB. GPU 2 has a total \
capacity of 79.19 GiB of which 6.68 GiB is free. Including non-PyTorch memory, this process has \
72.48 GiB memory in use. Of the allocated memory 70.90 GiB is allocated by PyTorch, and 180.00 MiB \
is reserved by PyTorch but unallocated.
"""
