"""What the peers are asked, each in an environment of its own: `bench/peers.py` runs these texts.

A program reads one case as JSON from stdin and prints {"versions": {...}, "mib": {row: MiB}}. Only
what a peer offers itself is called; where it has several ways to be asked, each is a row.
"""

from __future__ import annotations

from typing import NamedTuple


class Peer(NamedTuple):
    """A program that estimates memory: what to install, how to ask it, what it leaves out."""

    requires: tuple[str, ...]
    program: str
    leaves_out: str
    needs_torch: bool = False


START = """
import json, logging, sys
from importlib.metadata import version
logging.disable(logging.CRITICAL)
case = json.load(sys.stdin)
MIB = 2**20
def say(names, **mib):
    versions = {name: version(name) for name in names}
    print(json.dumps({"versions": versions, "mib": {k.replace("_", " "): v for k, v in mib.items()}}))
"""  # noqa: E501
HF_CONFIG = """
from transformers import GPT2Config, LlamaConfig
if case["style"] == "gpt2":
    config = GPT2Config(vocab_size=case["vocab"], n_positions=case["seq_len"],
        n_embd=case["width"], n_layer=case["layers"], n_head=case["heads"])
else:
    config = LlamaConfig(vocab_size=case["vocab"], hidden_size=case["width"],
        intermediate_size=case["mlp"], num_hidden_layers=case["layers"],
        num_attention_heads=case["heads"], max_position_embeddings=case["seq_len"],
        tie_word_embeddings=False)
"""
ACCELERATE = (
    HF_CONFIG
    + """
from accelerate import init_empty_weights
from accelerate.commands.estimate import estimate_training_usage
from accelerate.utils import calculate_maximum_sizes
from transformers import AutoModel
with init_empty_weights():
    model = AutoModel.from_config(config)
size, _ = calculate_maximum_sizes(model)
rows = {d: max(estimate_training_usage(size, d).values()) / MIB for d in ("float32", "bfloat16")}
say(["accelerate", "transformers", "torch"], **rows)
"""
)
VRAM_CHECK = """
from vram_check.estimator import estimate
def total(dtype):
    args = case["parameters"], case["batch"], dtype, "adamw", True, case["seq_len"]
    return estimate(*args).total_bytes / MIB
say(["vram-check"], fp32=total("fp32"), bf16=total("bf16"))
"""
FITCHECK = """
if case["style"] == "gpt2":
    sys.exit("its reader of configs takes models with a gated MLP and no biases only")
from fitcheck.config_parser import ModelConfig
from fitcheck.estimator import TrainingConfig, estimate
from fitcheck.gpu_db import get_gpu
model = ModelConfig("case", case["parameters"], case["width"], case["layers"], case["heads"],
    case["heads"], case["mlp"], case["vocab"], case["width"] // case["heads"], case["tied"])
training = TrainingConfig(precision="bf16", batch_size=case["batch"], seq_len=case["seq_len"],
    lora_rank=None, flash_attn=True)
report = estimate(model, training, get_gpu("h200"))
say(["fitcheck-llm"], total=report.total_mib, without_overhead=report.total_mib - report.overhead_mib)
"""  # noqa: E501
LLM_ANALYSIS = """
from llm_analysis.analysis import (ActivationRecomputation, DSZeRO, LLMAnalysis,
    get_dtype_config_by_name, get_gpu_config_by_name)
from llm_analysis.config import ModelConfig, ParallelismConfig
model = ModelConfig(name="case", num_layers=case["layers"], n_head=case["heads"],
    hidden_dim=case["width"], vocab_size=case["vocab"], max_seq_len=case["seq_len"],
    ffn_embed_dim=case["mlp"], model_type=case["style"])
analysis = LLMAnalysis(model, get_gpu_config_by_name("a100-sxm-80gb"),
    get_dtype_config_by_name("w16a16e16"), ParallelismConfig(dp_size=1), flops_efficiency=0.5)
found = analysis.training(batch_size_per_gpu=case["batch"], gradient_accumulation_steps=1,
    seq_len=case["seq_len"], total_num_tokens=1e9, ds_zero=DSZeRO(0), flash_attn=True,
    activation_recomputation=ActivationRecomputation(0))
say(["llm-analysis"], total=found["(weight+op_state+grad+act)_memory_per_gpu"] / MIB)
"""
DEEPSPEED = """
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as estimate
_, device = estimate(case["parameters"], 1, 1, cpu_offload=False)
say(["deepspeed", "torch"], ZeRO_2=device / MIB)
"""
# Its tracing stops at what Hugging Face's models do, so that it is given a plain module.
KITSUNE = """
import torch
from torch import nn
from torch.nn import functional as F
from kitsune.predict.estimator import predict_memory
C, H, V, M = (case[name] for name in ("width", "heads", "vocab", "mlp"))
gpt2 = case["style"] == "gpt2"
class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        norm = nn.LayerNorm if gpt2 else nn.RMSNorm
        self.first, self.second = norm(C), norm(C)
        self.qkv, self.out = nn.Linear(C, 3 * C, gpt2), nn.Linear(C, C, gpt2)
        self.up, self.down = nn.Linear(C, M, gpt2), nn.Linear(M, C, gpt2)
        self.gate = None if gpt2 else nn.Linear(C, M, False)
    def forward(self, x):
        B, T, _ = x.shape
        q, k, v = (t.view(B, T, H, -1).transpose(1, 2) for t in self.qkv(self.first(x)).chunk(3, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, C))
        h = self.second(x)
        h = F.gelu(self.up(h)) if gpt2 else F.silu(self.gate(h)) * self.up(h)
        return x + self.down(h)
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(V, C)
        self.positions = nn.Embedding(case["seq_len"], C) if gpt2 else None
        self.layers = nn.ModuleList(Layer() for _ in range(case["layers"]))
        self.norm = nn.LayerNorm(C) if gpt2 else nn.RMSNorm(C)
        self.head = nn.Linear(C, V, False)
        if case["tied"]:
            self.head.weight = self.tokens.weight
    def forward(self, tokens):
        tokens = tokens.long()
        x = self.tokens(tokens)
        if gpt2:
            x = x + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))
with torch.device("meta"):
    model = Model()
def total(dtype):
    made = predict_memory(model, (case["seq_len"],), case["batch"], dtype, "adamw")
    return made.total_bytes / MIB
say(["torch-kitsune", "torch"], fp32=total("float32"), bf16=total("bfloat16"))
"""
PEERS: dict[str, Peer] = {
    "accelerate": Peer(
        ("accelerate==1.15", "transformers"), ACCELERATE,
        "batch, sequence, an untied head", needs_torch=True,
    ),
    "vram-check": Peer(
        ("vram-check==0.1.1",), VRAM_CHECK, "sequence length"
    ),
    "fitcheck-llm": Peer(
        ("fitcheck-llm==0.3.1",), FITCHECK, "bf16 over fp32; total adds overhead"
    ),
    "llm-analysis": Peer(
        ("llm-analysis==0.2.2",), LLM_ANALYSIS, "logits but for one copy in 2 bytes"
    ),
    "deepspeed": Peer(
        ("deepspeed==0.19.8",), DEEPSPEED, "states only, as it says", needs_torch=True
    ),
    "torch-kitsune": Peer(
        ("torch-kitsune==0.7.0",), KITSUNE, "module outputs only, no loss", needs_torch=True
    ),
}  # fmt: skip
NOT_ON_PYPI = {
    "EleutherAI calc": "a script of the cookbook repository",
    "Megatron theoretical": "a module of the Megatron-LM repository, not of its package",
    "gpu_poor, vram.asmirnov.xyz, apxml": "web pages",
}
