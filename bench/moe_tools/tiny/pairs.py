"""A head start for a short training: embeddings that already know which token follows which.

A minute on two cores is some hundred steps, too few to learn even how often each token comes. Counting pairs over the
whole text takes a second, and a low-rank factor of the counts gives an embedding and an output head whose product is a
smoothed bigram model; training then has only the rest to learn. Pure but for torch's seed, which it sets.
"""

import numpy as np

SMOOTHING = 100.0
"""Each token's row of counts is mixed with this many draws from the tokens' overall frequencies."""
CONSTANT_SHARE = 0.5
RIDGE = 1e-6


def build_pair_start(ids: np.ndarray, vocabulary: int, hidden: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Embedding and output head, each (vocabulary, hidden), from the text's token ids in their order.

    `embedding @ head.T` approximates log P(next | token), up to a constant for each row, after a root-mean-square norm.
    """
    frequency = _frequencies(ids, vocabulary)
    # P(t|x) = (C[x,t] + a u[t]) / (n[x] + a), so log P = log u + log(1 + C / (a u)) + a constant of the row x.
    gain = np.log1p(count_pairs(ids, vocabulary) / (SMOOTHING * frequency))
    embedding = _normed_rows(_factor(gain, frequency, hidden - 1, seed), frequency)
    return embedding, _fit_head(embedding, np.log(frequency) + gain, frequency)


def count_pairs(ids: np.ndarray, vocabulary: int) -> np.ndarray:
    """How often each token (row) is followed by each other (column)."""
    pairs = np.bincount(ids[:-1] * vocabulary + ids[1:], minlength=vocabulary * vocabulary)
    table: np.ndarray = pairs.reshape(vocabulary, vocabulary).astype(np.float32)
    return table


def _frequencies(ids: np.ndarray, vocabulary: int) -> np.ndarray:
    counts = np.bincount(ids, minlength=vocabulary) + 0.5
    share: np.ndarray = (counts / counts.sum()).astype(np.float32)
    return share


def _factor(gain: np.ndarray, frequency: np.ndarray, rank: int, seed: int) -> np.ndarray:
    """Left factor of the gain, with common tokens weighing more: an error there costs more."""
    import torch

    torch.manual_seed(seed)
    weight = np.sqrt(frequency)
    left, values, _ = torch.svd_lowrank(torch.from_numpy(gain * np.outer(weight, weight)), q=rank, niter=2)
    factor: np.ndarray = (left * values.sqrt()).numpy() / weight[:, None]
    return factor


def _normed_rows(factor: np.ndarray, frequency: np.ndarray) -> np.ndarray:
    """Rows of root mean square 1, as the model's last norm makes them; a constant column carries the frequencies."""
    size = np.sqrt((frequency * (factor**2).sum(axis=1)).sum())
    rows = np.concatenate([np.full((len(factor), 1), CONSTANT_SHARE * size, dtype=np.float32), factor], axis=1)
    normed: np.ndarray = rows / np.sqrt((rows**2).mean(axis=1, keepdims=True))
    return normed.astype(np.float32)


def _fit_head(embedding: np.ndarray, log_odds: np.ndarray, frequency: np.ndarray) -> np.ndarray:
    """Least squares, each row weighing as often as its token comes."""
    target = log_odds - (log_odds * frequency).sum(axis=1, keepdims=True)
    weighted = (embedding * frequency[:, None]).T
    head: np.ndarray = np.linalg.solve(weighted @ embedding + RIDGE * np.eye(embedding.shape[1]), weighted @ target).T
    return head.astype(np.float32)
