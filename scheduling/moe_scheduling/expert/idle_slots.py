"""Idle slots: slots of a layer that no token needs, because a copy of an expert would cost more than it saves.

Each slot holds some expert. A slot whose expert has an earlier slot on the same rank is idle: no token is sent to it
(the node agent leaves it out of vLLM's table of replicas), its weights are never read, and filling it moves nothing.
While a placement is searched an idle slot holds a placeholder, a number from the number of experts on, so that it can
change places with an expert like any other.
"""

import numpy as np

from moe_scheduling.expert.placement import Flags, Floats, Ints, count_copies, mark_hosts


def serving_slots(table: Ints, ranks: int) -> Flags:
    """Returns [layer, slot]: whether tokens are sent to a slot; all but the first slot of an expert on a rank are
    idle.
    """
    rows = table.reshape(len(table), ranks, -1)
    order = np.argsort(rows, axis=2, kind="stable")
    ordered = np.take_along_axis(rows, order, 2)
    first = np.ones(rows.shape, np.bool_)
    first[:, :, 1:] = ordered[:, :, 1:] != ordered[:, :, :-1]
    serving = np.empty_like(first)
    np.put_along_axis(serving, order, first, 2)
    return serving.reshape(table.shape)


def serving_copies(table: Ints, experts: int, ranks: int) -> Ints:
    """Returns [layer, expert]: the ranks on which an expert's tokens are computed."""
    serving = serving_slots(table, ranks)
    if serving.all():
        return count_copies(table, experts)
    return count_copies(np.where(serving, table, experts), experts + 1)[:, :experts]


def park_idle(table: Ints, experts: int, ranks: int) -> Ints:
    """Returns the table with a placeholder in each idle slot, `experts` and up, each once in a layer."""
    return _put_placeholders(table, ~serving_slots(table, ranks), experts)


def drop_copies(table: Ints, work: Floats, experts: int, ranks: int) -> Ints:
    """Returns the table with one slot for each expert and placeholders in all others.

    Of the copies of all experts the one on the busiest rank goes first.

    Args:
        table: [layer, slot], without placeholders.
        work: [layer, expert], any measure of the work of an expert that has one slot.
        experts: number of logical experts.
        ranks: ranks of the group.
    """
    layers, slots = table.shape
    row, idle = np.arange(layers), ~serving_slots(table, ranks)
    load = np.take_along_axis(work, table, 1) * ~idle
    copies = serving_copies(table, experts, ranks)
    for _ in range(slots - experts):
        rank_load = load.reshape(layers, ranks, -1).sum(2).repeat(slots // ranks, 1)
        surplus = ~idle & (np.take_along_axis(copies, table, 1) > 1)
        slot = np.where(surplus, rank_load, -np.inf).argmax(1)
        layer = row[surplus[row, slot]]
        idle[layer, slot[layer]] = True
        load[layer, slot[layer]] = 0.0
        copies[layer, table[layer, slot[layer]]] -= 1
    return _put_placeholders(table, idle, experts)


def _put_placeholders(table: Ints, idle: Flags, experts: int) -> Ints:
    return np.where(idle, experts - 1 + idle.cumsum(1), table)


def fill_idle(table: Ints, before: Ints, work: Floats, ranks: int) -> Ints:
    """Returns the table with an expert in the place of each placeholder, so that nothing moves for it.

    It is the expert that the slot had before where the rank still has that one elsewhere, else the coldest expert that
    stays on the rank. Where none stays the slots keep those that they had before, as copies that serve.

    Args:
        table: [layer, slot], with placeholders.
        before: [layer, slot], the placement in force.
        work: [layer, expert], load of the experts.
        ranks: ranks of the group.
    """
    layers, experts = work.shape
    rows, old = table.reshape(layers, ranks, -1), before.reshape(layers, ranks, -1)
    real = rows < experts
    layer, rank = np.arange(layers)[:, None, None], np.arange(ranks)[:, None]
    stays = real & mark_hosts(before, experts, ranks)[layer, np.where(real, rows, 0), rank]
    heat = np.take_along_axis(work, np.where(real, rows, 0).reshape(layers, -1), 1).reshape(rows.shape)
    coldest = np.take_along_axis(rows, np.where(stays, heat, np.inf).argmin(2)[..., None], 2)[..., 0]
    filled = rows.copy()
    for place in range(rows.shape[2]):
        was = old[:, :, place]
        keeps = (rows == was[..., None]).any(2) | ~stays.any(2)
        filled[:, :, place] = np.where(real[:, :, place], rows[:, :, place], np.where(keeps, was, coldest))
    return filled.reshape(table.shape)
