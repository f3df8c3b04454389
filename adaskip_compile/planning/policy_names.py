"""The policies and the compensations by name, with what each does in a few words. Needs no PyTorch: the command line's help shows it."""

from __future__ import annotations

POLICIES = {
    "adaskip": "the sublayers most similar before and after, of all kinds: the paper's",
    "attention_only": "the most similar attentions (LLM-Drop)",
    "loss_greedy": "the sublayers that lose least, each with all before it: by the joint order of the profile",
    "random": "sublayers drawn by --seed",
    "early_exit": "the last layers",
    "skip_decode": "the first layers after layer 0; ever more of them where only decode skips",
    "unified": "every n-th layer",
    "shortgpt": "whole layers of least block influence",
}
COMPENSATIONS = {
    "none": "nothing: the stream goes on as it is",
    "scale": "the stream times a number: the paper's",
    "channel": "a factor and a shift for each channel",
    "low_rank": "what a low-rank map makes of the stream's direction is added",
    "affine": "what a full matrix makes of it is added",
}
# Those that go by more than is learned from requests.
PROFILED_POLICIES = ("loss_greedy", "shortgpt")
