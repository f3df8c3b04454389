"""Policies: which sublayers to skip, chosen offline from a profile; one function for each.

Their names are those of :data:`adaskip_compile.planning.policy_names.POLICIES`. Some choose among sublayers: ``adaskip``,
``attention_only``, ``random``, ``loss_greedy``. The others choose whole layers, as the methods that they stand for do:
``early_exit``, ``skip_decode``, ``unified``, ``shortgpt``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

from adaskip_compile.profiling.layers import Layer, find_layers
from adaskip_compile.profiling.profiles import Profile
from adaskip_passes.errors import OptionError


def most_similar(profile: Profile, count: int) -> tuple[str, ...]:
    """Return the ``count`` sublayers, of all kinds in one ranking, that change the stream least.

    The paper's own choice (AdaSkip, arXiv 2501.02336, section 3.2).
    """
    return tuple(sublayer.path for sublayer in profile.ranking()[:count])


def most_similar_attention(profile: Profile, count: int) -> tuple[str, ...]:
    """Return the ``count`` attentions that change the stream least.

    LLM-Drop's one-shot Attention Drop: importance is 1 - cosine(a, b), the residual included (He et al., "What
    Matters in Transformers? Not All Attention is Needed", arXiv 2406.15786, on similarity-based drop and Attention Drop).
    """
    attentions = [sublayer.path for sublayer in profile.ranking() if sublayer.kind == "attention"]
    if count > len(attentions):
        raise OptionError(f"attention_only cannot skip {count} sublayers: this model has {len(attentions)} attentions")
    return tuple(attentions[:count])


def random_sublayers(profile: Profile, count: int, seed: int) -> tuple[str, ...]:
    """Return ``count`` sublayers drawn at random, the same ones for the same ``seed``; one attention is never drawn."""
    generator = random.Random(seed)
    paths = [sublayer.path for sublayer in profile.sublayers]
    attentions = [sublayer.path for sublayer in profile.sublayers if sublayer.kind == "attention"]
    kept = generator.choice(attentions or paths)
    if count >= len(paths):
        raise OptionError(f"random cannot skip {count} of this model's {len(paths)} sublayers: one must stay")
    return tuple(generator.sample([path for path in paths if path != kept], count))


def least_loss(profile: Profile, count: int) -> tuple[str, ...]:
    """Return the first ``count`` sublayers of the order in which each one, skipped with all before it, loses least.

    Greedy selection by joint effect, scored anew after each step, as SLEB does for whole blocks (Song et al., arXiv
    2402.09025) and BlockPruner for attentions and FFNs (Zhong et al., arXiv 2406.10594, on iterative search).
    """
    order = joint_order(profile)
    if count > len(order):
        raise OptionError(
            f"loss_greedy cannot skip {count} sublayers: the joint order of this profile has {len(order)}"
        )
    return tuple(path for path, _ in order[:count])


def joint_order(profile: Profile) -> tuple[tuple[str, float], ...]:
    """Return the paths of sublayers in the order to skip them, each with the loss once it and all before it are skipped.

    Losses are nats a token above that of the full model.

    Raises:
        OptionError: It was not measured.
    """
    if not profile.joint_order:
        raise OptionError(
            "this profile holds no joint order of sublayers, which loss_greedy and max_loss need: measure one with "
            "adaskip_compile.order_by_loss(model, profile, samples) or `adaskip profile MODEL --joint N`"
        )
    return tuple((step.path, step.loss) for step in profile.joint_order)


def last_layers(profile: Profile, layers: Sequence[Layer], count: int) -> tuple[Layer, ...]:
    """Return the last ``count`` layers: an early exit.

    The baseline "Early Exit" of AdaSkip's experiments (section 4): all tokens leave at one layer, as with the fixed
    exits of LayerSkip (Elhoushi et al., arXiv 2404.16710, on early exit inference).
    """
    del profile
    return tuple(layers[len(layers) - count :])


def first_layers(profile: Profile, layers: Sequence[Layer], count: int) -> tuple[Layer, ...]:
    """Return the first ``count`` layers after layer 0.

    SkipDecode bypasses lower to middle layers after a warm-up layer and runs all the upper ones, so that the cache
    has no gaps (Del Corro et al., arXiv 2307.02628, on the method). It lets their number grow linearly with the
    position of a decoded token: :func:`adaskip_compile.planning.planner.plan` makes a ramp of them where only decode skips.
    """
    del profile
    return tuple(layers[1 : 1 + count])


def every_nth_layer(profile: Profile, layers: Sequence[Layer], count: int) -> tuple[Layer, ...]:
    """Return every (L // count)-th of L layers.

    Unified Layer Skipping: the same layers for every token, spread evenly (Liu et al., arXiv 2404.06954, on the
    strategy); in the form in which AdaSkip compares with it (section 4).
    """
    del profile
    stride = len(layers) // max(count, 1)
    # With a stride of 1 they would be the first layers, one after another: nothing is spread any more.
    return tuple(layers[stride - 1 :: stride][:count]) if stride > 1 else ()


def least_influence(profile: Profile, layers: Sequence[Layer], count: int) -> tuple[Layer, ...]:
    """Return the ``count`` layers of least block influence, 1 - E[cosine(x_i, x_{i+1})] over a whole layer.

    ShortGPT (Men et al., arXiv 2403.03853, on layer importance).
    """
    whole = {layer.paths: layer.mean_similarity for layer in profile.layers}
    single = {(sublayer.path,): sublayer.mean_similarity for sublayer in profile.sublayers}
    similarity = {**single, **whole}
    if not {*layers} <= similarity.keys():
        raise OptionError(
            "this profile holds no similarity of whole layers, which shortgpt needs: it was learned from requests or "
            "made by an earlier version; measure one with adaskip_compile.profile or `adaskip profile`"
        )
    return tuple(sorted(layers, key=lambda layer: -similarity[layer])[:count])


SublayerPolicy = Callable[[Profile, int], tuple[str, ...]]
LayerPolicy = Callable[[Profile, Sequence[Layer], int], tuple[Layer, ...]]

SUBLAYER_POLICIES: Mapping[str, SublayerPolicy] = {
    "adaskip": most_similar,
    "attention_only": most_similar_attention,
    "loss_greedy": least_loss,
}
LAYER_POLICIES: Mapping[str, LayerPolicy] = {
    "early_exit": last_layers,
    "skip_decode": first_layers,
    "unified": every_nth_layer,
    "shortgpt": least_influence,
}


def choose(profile: Profile, policy: str, count: int, seed: int = 0) -> tuple[str, ...]:
    """Return the ``count`` sublayers that ``policy`` skips, in the order in which it chooses them.

    Raises:
        OptionError: ``count`` sublayers make no whole layers, or are more than the policy has; the profile lacks
            what the policy goes by.
    """
    if policy == "random":
        return random_sublayers(profile, count, seed)
    if policy in SUBLAYER_POLICIES:
        return SUBLAYER_POLICIES[policy](profile, count)
    sets = {len(chosen): chosen for chosen in layer_choices(profile, policy)}
    if count in sets:
        return sets[count]
    fitting = [max(size for size in sets if size < count), *sorted(size for size in sets if size > count)[:1]]
    raise OptionError(
        f"{policy} skips whole layers, which of this model hold no {count} sublayers together: skip "
        f"{' or '.join(map(str, fitting))}"
    )


def layer_choices(profile: Profile, policy: str) -> tuple[tuple[str, ...], ...]:
    """Return what ``policy`` skips of no layer, of one layer, and so on up to all: each a set of sublayers."""
    layers = find_layers([sublayer.path for sublayer in profile.sublayers])
    sets = (LAYER_POLICIES[policy](profile, layers, count) for count in range(len(layers) + 1))
    return tuple(tuple(path for layer in chosen for path in layer) for chosen in sets)


def keeps_enough(profile: Profile, skipped: Sequence[str]) -> bool:
    """Return whether a model can run without ``skipped``: neither all sublayers go nor all attentions."""
    # The sequence length and the positions are read off an attention's cache, and some sublayer must be left to run.
    kept = [sublayer for sublayer in profile.sublayers if sublayer.path not in skipped]
    has_attention = any(sublayer.kind == "attention" for sublayer in profile.sublayers)
    return any(sublayer.kind == "attention" or not has_attention for sublayer in kept)


def largest_skip(profile: Profile, policy: str = "adaskip", seed: int = 0) -> int:
    """Return how many sublayers ``policy`` can skip at most: neither all of them nor the last attention.

    Raises:
        OptionError: The profile lacks what the policy goes by.
    """
    if policy in LAYER_POLICIES:
        return max(len(chosen) for chosen in layer_choices(profile, policy) if keeps_enough(profile, chosen))
    most = {"attention_only": sum(sublayer.kind == "attention" for sublayer in profile.sublayers)}
    if policy == "loss_greedy":
        most[policy] = len(joint_order(profile))
    counts = range(min(most.get(policy, len(profile.sublayers)), len(profile.sublayers) - 1), 0, -1)
    return next((count for count in counts if keeps_enough(profile, choose(profile, policy, count, seed))), 0)
