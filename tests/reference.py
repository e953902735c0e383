"""The slow, obvious version of everything numeric; the library is compared with it."""

from __future__ import annotations

import math
import statistics
from fractions import Fraction


def flow_weights(losses, temperature):
    """exp(-loss / temperature), one sample at a time."""
    return [math.exp(-float(loss) / temperature) for loss in losses]


def relative_flow_weights(losses, temperature):
    """exp(-(loss - smallest loss) / temperature): the largest weight is 1."""
    smallest = min(float(loss) for loss in losses)
    return flow_weights([float(loss) - smallest for loss in losses], temperature)


def temperature_of(losses, rule):
    """What "median", "mean" or "q0.25" picks, in exact fractions."""
    ordered = sorted(Fraction(float(loss)) for loss in losses)
    if rule == "mean":
        return sum(ordered) / len(ordered)
    share = 0.5 if rule == "median" else float(rule.removeprefix("q"))
    place = Fraction(share * (len(ordered) - 1))
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def median(losses):
    """The mean of the two middle values when their number is even."""
    return statistics.median(float(loss) for loss in losses)


def effective_sample_size(weights):
    """(Σw)² / Σw²."""
    weights = [float(weight) for weight in weights]
    return sum(weights) ** 2 / sum(weight * weight for weight in weights)


def weighted_mean(losses, weights, normalize="count", num_items=None):
    """Σ wℓ / N or Σ wℓ / Σ w in Python floats, one sample at a time; weight 0 is left out."""
    pairs = [(float(l), float(w)) for l, w in zip(losses, weights, strict=True)]  # noqa: E741
    total = math.fsum(loss * weight for loss, weight in pairs if weight)
    if num_items is None:
        num_items = len(pairs) if normalize == "count" else math.fsum(w for _, w in pairs)
    return total / float(num_items) if num_items else 0.0


def causal_lm_loss(
    logits, labels, weights=None, normalize="count", num_items=None, ignore_index=-100
):
    """The weighted next-token loss, one token at a time, in Python floats."""
    losses, token_weights = [], []
    for b, row in enumerate(labels.tolist()):
        for t in range(1, len(row)):
            if row[t] == ignore_index:
                continue
            values = logits[b, t - 1].double().tolist()
            top = max(values)
            log_sum = top + math.log(math.fsum(math.exp(v - top) for v in values))
            losses.append(log_sum - values[row[t]])
            if weights is None:
                token_weights.append(1.0)
            else:
                token_weights.append(float(weights[b] if weights.dim() == 1 else weights[b, t]))
    return weighted_mean(losses, token_weights, normalize, num_items)


def linear_probe(features, targets, strength, loss, steps=20000, rate=0.5):
    """Plain gradient descent, features of mean 0 and variance 1; (C, D) weight, (C,) bias."""
    import numpy as np

    x = np.asarray(features, dtype=np.float64)
    y = np.asarray(targets, dtype=np.float64)
    mean, scale = x.mean(0), x.std(0)
    z = (x - mean) / scale
    if loss == "cross_entropy":
        y = np.eye(int(y.max()) + 1)[y.astype(int)]
    weight, bias = np.zeros((y.shape[1], x.shape[1])), np.zeros(y.shape[1])
    for _ in range(steps):
        out = z @ weight.T + bias
        if loss == "cross_entropy":
            out = np.exp(out - out.max(1, keepdims=True))
            slope = out / out.sum(1, keepdims=True) - y
        elif loss == "binary_cross_entropy":
            slope = (1 / (1 + np.exp(-out)) - y) / y.shape[1]
        else:
            slope = 2 * (out - y) / y.shape[1]
        weight = weight - rate * (slope.T @ z / len(x) + strength * weight)
        bias = bias - rate * slope.mean(0)
    return weight / scale, bias - (weight / scale) @ mean


def anchor_penalty(parameters, started, kind, strength):
    """strength · Σ (θ − θ*)² or strength · Σ |θ − θ*|, one number at a time."""
    total = 0.0
    for now, then in zip(parameters, started, strict=True):
        for a, b in zip(now.flatten().tolist(), then.flatten().tolist(), strict=True):
            total += (a - b) ** 2 if kind == "l2" else abs(a - b)
    return strength * total


def wise_ft(pretrained, finetuned, alpha):
    """α · fine-tuned + (1 − α) · pre-trained, entry by entry, in double precision."""
    return {
        name: alpha * finetuned[name].double() + (1 - alpha) * pretrained[name].double()
        for name in finetuned
    }


def token_rule_weights(rule, losses, temperature=None):
    """Weights from the current model's token losses, one token at a time."""
    losses = [float(loss) for loss in losses]
    if rule == "dft":
        return [math.exp(-loss) for loss in losses]
    scale = median(losses) if temperature is None else temperature
    if rule == "talr":
        return [math.exp(-loss / scale) for loss in losses]
    return [math.exp((loss - max(losses)) / scale) for loss in losses]


def top_entropy(logits, count=20):
    """The entropy of the likeliest classes, their probabilities made to sum to 1, over log k."""
    top = sorted((float(logit) for logit in logits), reverse=True)[:count]
    powers = [math.exp(logit - top[0]) for logit in top]
    shares = [power / math.fsum(powers) for power in powers]
    entropy = -math.fsum(share * math.log(share) for share in shares if share)
    return entropy / math.log(len(top)) if len(top) > 1 else 0.0


def anchored_loss(logits, labels, weights, rule, strength, reference):
    """Σ weight · (rule · loss + strength · KL(reference ‖ current)) / targets, token by token.

    The logits keep their gradients; everything else is a constant.
    """
    import torch

    total, count = 0.0, 0
    for b, row in enumerate(labels.tolist()):
        for t in range(1, len(row)):
            if row[t] == -100:
                continue
            count += 1
            log_q, log_p = (z[b, t - 1].double().log_softmax(0) for z in (logits, reference))
            loss = -log_q[row[t]]
            factor = 1.0
            if rule == "eaft":
                factor = top_entropy(logits[b, t - 1].detach())
            elif rule is not None:
                (factor,) = token_rule_weights(rule, [loss.detach()])
            divergence = (log_p.detach().exp() * (log_p.detach() - log_q)).sum()
            weight = 1.0 if weights is None else weights[b] if weights.dim() == 1 else weights[b, t]
            total = total + weight * (factor * loss + strength * divergence)
    return torch.as_tensor(total) / max(count, 1)


def head_logits(hidden, head, softcap=None, logit_scale=1.0):
    """All logits, as a model with a scale and a softcap makes them."""
    logits = head(hidden) * logit_scale
    return logits if softcap is None else softcap * (logits / softcap).tanh()


def sample_at(integer_weights, point):
    """The sample whose share of the summed weights holds the point, by walking along."""
    for sample, weight in enumerate(integer_weights):
        if point < weight:
            return sample
        point -= weight
    raise ValueError("the point lies beyond the total")


def inclusion_chances(weights, count):
    """The probability of each sample to be among `count` drawn one by one without replacement."""
    chances = [0.0] * len(weights)

    def draw(left, chance, chosen):
        if len(chosen) == count:
            for sample in chosen:
                chances[sample] += chance
            return
        total = sum(weights[sample] for sample in left)
        for sample in left:
            draw(left - {sample}, chance * weights[sample] / total, (*chosen, sample))

    draw(frozenset(range(len(weights))), 1.0, ())
    return chances


def causal_lm_sample_loss(model, sample):
    """(mean loss, targets) of one sample alone: float32 logits, shifted labels, one at a time."""
    import torch

    ids, labels = torch.as_tensor(sample["input_ids"]), torch.as_tensor(sample["labels"])
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0].float()
    losses = []
    for position in range(1, len(ids)):
        if labels[position] != -100:
            log_probabilities = torch.log_softmax(logits[position - 1], dim=0)
            losses.append(-log_probabilities[labels[position]].item())
    return (sum(losses) / len(losses) if losses else math.nan), len(losses)


def head_losses(hidden, weight, targets, bias=None, scale=1.0, softcap=None):
    """−log softmax of every row's target over full float64 logits."""
    import torch

    logits = hidden.double() @ weight.double().T
    if bias is not None:
        logits = logits + bias.double()
    logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return -torch.log_softmax(logits, dim=1)[torch.arange(len(targets)), targets]


def running_median_weights(windows, loss_of):
    """Weights of windows one after another, each under the exact median of all losses so far."""
    seen, weights = [], []
    for window in windows:
        losses = [loss_of(sample) for sample in window]
        seen += losses
        weights += flow_weights(losses, median(seen))
    return weights


def quantile(losses, share):
    """Linear interpolation between the two nearest values in order."""
    ordered = sorted(float(loss) for loss in losses)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def mean_ranks(values):
    """The place of each value among all, from 1; equal ones share the mean of theirs."""
    return [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]


def target_columns(hidden, weight, targets, bias=None, scale=1.0, softcap=None):
    """(entropy, correct, gradient norm) of every row, the last through autograd, in float64."""
    import torch

    found = []
    for h, target in zip(hidden.double(), targets, strict=True):
        layer = weight.detach().double().requires_grad_()
        logits = layer @ h + (0 if bias is None else bias.detach().double())
        logits = logits * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        log_p = torch.log_softmax(logits, dim=0)
        entropy = -(log_p.exp() * log_p).sum().item()
        correct = float(logits.argmax() == target)
        (gradient,) = torch.autograd.grad(-log_p[target], layer)
        found.append((entropy, correct, gradient.norm().item()))
    return [torch.tensor(values) for values in zip(*found, strict=True)]


def weighted_second_moment(x, apart, temperature):
    """Mean of exp(−⟨e, x⟩² / temperature) x xᵀ over samples, and each entry's standard error."""
    import numpy as np

    x, apart = np.asarray(x, dtype=np.float64), np.asarray(apart, dtype=np.float64)
    weights = np.exp(-((x @ apart) ** 2) / temperature)
    dimensions = range(x.shape[1])
    products = [[weights * x[:, i] * x[:, j] for j in dimensions] for i in dimensions]
    mean = np.array([[entry.mean() for entry in row] for row in products])
    error = np.array([[entry.std() / len(x) ** 0.5 for entry in row] for row in products])
    return mean, error


def attention(queries, keys, values, scaling, window=None, softcap=None, sinks=None):
    """(H, T, d) causal attention, one head and one query at a time; keys may begin earlier."""
    import torch

    out = torch.zeros(*queries.shape[:2], values.shape[-1], dtype=torch.float64)
    before, groups = keys.shape[1] - queries.shape[1], len(queries) // len(keys)
    for head, rows in enumerate(queries.double()):
        for place, query in enumerate(rows):
            last = before + place
            first = 0 if window is None else max(0, last + 1 - window)
            scores = keys[head // groups, first : last + 1].double() @ query * scaling
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if sinks is not None:
                scores = torch.cat([scores, sinks[head : head + 1].double()])
            shares = torch.softmax(scores, 0)[: last + 1 - first]
            out[head, place] = shares @ values[head // groups, first : last + 1].double()
    return out


def mofo_step(values, gradients, momentum, rate, decay, share):
    """One SGD step with momentum that moves only the entries of largest momentum, one by one."""
    momentum = [decay * m + g for m, g in zip(momentum, gradients, strict=True)]
    count = max(1, round(share * len(values)))
    largest = sorted(range(len(values)), key=lambda i: -abs(momentum[i]))[:count]
    moved = [v - rate * momentum[i] if i in largest else v for i, v in enumerate(values)]
    return moved, momentum


def paired_t(differences):
    """The t statistic of a paired test."""
    count = len(differences)
    centre = sum(differences) / count
    variance = sum((d - centre) ** 2 for d in differences) / (count - 1)
    return centre / (variance / count) ** 0.5


def reordered_columns(columns, order):
    """Columns of samples in another order, one sample and one target at a time."""
    import torch

    ends = columns["count"].cumsum(0).tolist()
    ordered = {name: [] for name in columns}
    for sample in order:
        for name in columns:
            if name == "token_loss":
                ordered[name] += columns[name][([0, *ends])[sample] : ends[sample]].tolist()
            else:
                ordered[name].append(columns[name][sample].item())
    return {name: torch.tensor(ordered[name], dtype=columns[name].dtype) for name in columns}


def mean_over_views(losses_of_views):
    """The mean of each sample's losses over views, one sample at a time."""
    return [sum(losses) / len(losses) for losses in zip(*losses_of_views, strict=True)]


def divergences(base, tuned):
    """KL, reverse KL and agreement of the predictions of (n, V) logits, in float64."""
    p, q = base.double().log_softmax(1), tuned.double().log_softmax(1)
    return {
        "kl": (p.exp() * (p - q)).sum(1),
        "reverse_kl": (q.exp() * (q - p)).sum(1),
        "agreement": (p.argmax(1) == q.argmax(1)).double(),
    }


def bounded_penalty(kl, strength, pull=0.2):
    """The output anchor's penalty of each target: a pseudo-Huber function of √(2 KL)."""
    if strength == 0:
        return 0 * kl
    bend = pull / min(strength, 10)
    return pull * ((bend**2 + 2 * kl.double()).sqrt() - bend)
