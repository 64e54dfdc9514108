"""One rank of an expert group inside vLLM: it counts routing, keeps the beat, and moves weights when all ranks do.

`join_expert_group`, called by the plugin in each process of an engine with an expert group, puts it in the place of
vLLM's own balancer: `EplbState.add_model` makes an `ExpertGroup`, `prepare_forward` and `step` tell it of each pass.
vLLM's load window and policy are not used; its maps, its buffer and its communicator are, and its asynchronous worker,
where one was started, is never woken: a move is cut into slices that fit into a step.

What is decided is in `moe_agent.experts`; here is what touches vLLM and torch. Every collective here is entered by all
ranks, because each reads the same beat (`moe_agent.experts.protocol`). An error in the midst of a move ends the engine:
weights of which nobody knows whose they are must not answer a request, and the agent starts the whole group anew.
"""

import os
import time
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from vllm.distributed.eplb.eplb_state import EplbModelState, EplbState, _commit_eplb_maps_for_layer
from vllm.distributed.eplb.rebalance_execute import move_from_buffer, transfer_layer
from vllm.distributed.parallel_state import get_ep_group, get_node_count, get_tp_group
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

from moe_agent.experts.decision import Decider
from moe_agent.experts.directive import GroupShape, list_placement_problems
from moe_agent.experts.first_rank import FirstRank, checksum
from moe_agent.experts.planning import Costs, Slots
from moe_agent.experts.protocol import Action, Beat, beat_size, pack_beat, unpack_beat
from moe_agent.experts.published import experts_path
from moe_agent.experts.recording import Counted, Report, RoutingRecorder
from moe_agent.experts.step_times import load_class
from moe_agent.experts.work_meter import WorkMeter
from moe_agent.shared_memory import RUN_DIR_VARIABLE
from moe_agent.shared_memory.expert_record import ExpertRecordWriter, ExpertState
from moe_agent.vllm.device_recording import DeviceRecorder
from moe_agent.vllm.version import replace_attribute

logger = init_logger(__name__)

# Bytes that a second moves, until the first move has been measured.
FIRST_MOVE_BYTES_PER_S = 1e9
# Between passes that are further apart the engine was idle.
LONGEST_STEP_S = 2.0
# On other nodes than the first rank's nobody waits until the group has taken settings of experts.
NOT_ASKED = 2**63


def join_expert_group(meter: WorkMeter) -> None:
    """Puts expert groups in the place of vLLM's balancer, in this process; `meter` learns what expert work takes."""
    groups: dict[int, ExpertGroup] = {}
    add_model, prepare_forward, step = EplbState.add_model, EplbState.prepare_forward, EplbState.step

    def add_and_join(self: EplbState, model: Any, model_config: Any, model_name: str | None = None) -> None:
        add_model(self, model, model_config, model_name)
        if not groups:
            groups[id(self)] = ExpertGroup(self, Path(os.environ[RUN_DIR_VARIABLE]), meter)

    def prepare_and_note(self: EplbState, model_config: Any, num_unpadded_tokens: int, *slices: Any) -> None:
        prepare_forward(self, model_config, num_unpadded_tokens, *slices)
        if id(self) in groups:
            groups[id(self)].begin_pass(num_unpadded_tokens)

    def end_pass(self: EplbState, is_dummy: bool = False, is_profile: bool = False, log_stats: bool = False) -> None:
        group = groups.get(id(self))
        if group is None or (is_profile and not group.on_cpu):
            step(self, is_dummy, is_profile, log_stats)
        elif not is_profile:
            group.end_pass(is_dummy)

    replace_attribute(EplbState, "add_model", add_and_join)
    replace_attribute(EplbState, "prepare_forward", prepare_and_note)
    replace_attribute(EplbState, "step", end_pass)


class ExpertGroup:
    """See the module; made on all ranks at once, while they load the model."""

    def __init__(self, state: EplbState, run_dir: Path, meter: WorkMeter) -> None:
        self._model_state = next(iter(state.model_states.values()))
        self.on_cpu = state.device.type == "cpu"
        group = get_ep_group()
        self._group, self._device_group = group.cpu_group, group.device_group
        self._rank, self._first = group.rank_in_group, group.ranks[0]
        self._meter, self._run_dir = meter, run_dir
        self._shape = self._read_shape(group.world_size)
        self._recorder = self._make_recorder(state)
        self._capture_routing()
        if state.should_record_tensor is not None:
            # vLLM's own counts have no reader here.
            state.should_record_tensor.fill_(False)
        self._passes = 0
        self._next_beat = 1
        self._real_tokens = 0
        self._all_tokens: list[int] = []
        self._begun_s = self._ended_s = 0.0
        self._page = self._open_page(state)
        self._mind = self._make_mind() if self._rank == 0 else None

    # 1. What the group is.

    def _read_shape(self, ranks: int) -> GroupShape:
        model = self._model_state.model
        return GroupShape(
            ranks=ranks,
            nodes=get_node_count(),
            layers=model.num_moe_layers,
            experts=model.num_logical_experts,
            slots_per_rank=model.num_local_physical_experts,
        )

    def _make_recorder(self, state: EplbState) -> RoutingRecorder | DeviceRecorder:
        layers, experts = self._shape.layers, self._shape.experts
        if self.on_cpu:
            return RoutingRecorder(layers, experts)
        config = self._runner(0).moe_config
        return DeviceRecorder(layers, experts, config.max_num_tokens, config.experts_per_token, state.device)

    def _runner(self, layer: int) -> Any:
        return self._model_state.model.moe_layers[layer]

    def _capture_routing(self) -> None:
        for layer in range(self._shape.layers):
            runner = self._runner(layer)
            if runner.is_monolithic or not isinstance(runner.router, BaseRouter):
                logger.warning("The kernel of %s routes by itself: its load is not recorded", runner.layer_name)
                continue
            runner.router.set_capture_fn(partial(self._capture, layer))

    def _open_page(self, state: EplbState) -> ExpertRecordWriter | None:
        """Of the ranks that one scheduler drives, the first tells it."""
        if get_tp_group().rank_in_group != 0:
            return None
        return ExpertRecordWriter(self._run_dir, state.parallel_config.data_parallel_index, ExpertState())

    def _make_mind(self) -> FirstRank:
        sharing = 1 if self._runner(0).moe_config.is_sequence_parallel else get_tp_group().world_size
        placement = self._placement()
        return FirstRank(self._run_dir, self._shape, placement, self._costs(), Decider().decide, sharing)

    def _costs(self) -> Costs:
        """What is known before anything was measured."""
        expert_bytes = sum(weight[0].nbytes for weight in self._model_state.model.expert_weights[0])
        move_s = expert_bytes / FIRST_MOVE_BYTES_PER_S
        return Costs(token_s=0.0, remote_token_s=0.0, internode_token_s=0.0, move_s=move_s)

    def _placement(self) -> Slots:
        placement: Slots = self._model_state.physical_to_logical_map.cpu().numpy().astype(np.int64)
        return placement

    # 2. Each pass.

    def begin_pass(self, real_tokens: int) -> None:
        """A pass with so many real tokens of this rank begins."""
        self._real_tokens, self._begun_s = real_tokens, time.perf_counter()

    def _capture(self, layer: int, ids: Tensor) -> None:
        if not self.on_cpu:
            self._recorder.capture(layer, ids)  # type: ignore[arg-type]
        elif self._recorder.on:
            if layer == 0:
                self._all_tokens = read_tokens_of_ranks()
            self._recorder.capture(layer, ids.numpy())  # type: ignore[arg-type]

    def end_pass(self, is_dummy: bool) -> None:
        """A pass has ended on all ranks; the same number of it everywhere."""
        real_tokens = 0 if is_dummy else self._real_tokens
        now_s = time.perf_counter()
        # A device works on while the host goes ahead: there a step lasts from one end of a pass to the next.
        step_s, self._ended_s = now_s - (self._begun_s if self.on_cpu else self._ended_s), now_s
        if self._recorder.on and real_tokens and step_s < LONGEST_STEP_S:
            self._learn_step(self._all_tokens or [real_tokens], step_s)
        self._recorder.end_pass(real_tokens)
        self._passes += 1
        if self._passes >= self._next_beat:
            self._keep_beat()

    def _learn_step(self, tokens: list[int], step_s: float) -> None:
        if self._mind is not None:
            self._mind.controller.step_took(load_class(sum(tokens), max(tokens)), step_s)
        if not self.on_cpu:
            # An upper bound of what a token of expert work takes: all that a token takes, laid on its experts.
            self._meter.add(max(tokens) * self._runner(0).moe_config.experts_per_token * self._shape.layers, step_s)

    # 3. The beat.

    def _keep_beat(self) -> None:
        begun_s = time.perf_counter()
        beat = self._share_beat()
        self._next_beat = self._passes + beat.next_in
        if beat.recording and not self._recorder.on:
            self._recorder.take()
        self._recorder.on = self._meter.on = beat.recording
        if beat.action is Action.GATHER:
            self._gather()
        elif beat.action is Action.MOVE:
            moved = self._move(beat)
            if self._mind is not None:
                self._mind.controller.moved(time.perf_counter() - begun_s, moved)
        self._tell_scheduler(beat)

    def _share_beat(self) -> Beat:
        numbers = torch.zeros(beat_size(self._shape.ranks), dtype=torch.float64)
        if self._mind is not None:
            self._mind.controller.learn_work(self._meter.token_s)
            numbers = torch.from_numpy(pack_beat(self._mind.beat(self._passes)))
        dist.broadcast(numbers, src=self._first, group=self._group)
        return unpack_beat(numbers.numpy())

    def _tell_scheduler(self, beat: Beat) -> None:
        if self._page is None:
            return
        ranks = get_tp_group().world_size
        pressure = max(beat.pressures[self._rank : self._rank + ranks])
        version = beat.config_version if self._is_beside_first else NOT_ASKED
        self._page.write(ExpertState(config_version=version, balance=beat.balance, pressure=pressure))

    @cached_property
    def _is_beside_first(self) -> bool:
        """Whether the settings of this node's agent are those that the group goes by; known at the first beat."""
        return experts_path(self._run_dir).exists()

    def _gather(self) -> None:
        counted = self._recorder.take()
        head = np.array([checksum(self._placement()), counted.pair_passes], np.int64)
        mine = torch.from_numpy(np.concatenate([head, counted.tokens.ravel(), counted.pairs.ravel()]))
        if self._mind is None:
            dist.gather(mine, dst=self._first, group=self._group)
            return
        everyone = [torch.empty_like(mine) for _ in range(self._shape.ranks)]
        dist.gather(mine, everyone, dst=self._first, group=self._group)
        self._mind.controller.gathered([self._read_report(row.numpy(), counted) for row in everyone])

    def _read_report(self, numbers: Slots, like: Counted) -> Report:
        tokens, pairs = np.split(numbers[2:], [like.tokens.size])
        counted = Counted(
            tokens=tokens.reshape(like.tokens.shape), pairs=pairs.reshape(like.pairs.shape), pair_passes=int(numbers[1])
        )
        return Report(counted=counted, checksum=int(numbers[0]))

    # 4. A move.

    def _move(self, beat: Beat) -> bool:
        """Moves the layers of a beat; False, and nothing moved, when a rank cannot take part."""
        plan = torch.zeros((beat.layers, 1 + self._shape.slots), dtype=torch.int64)
        if self._mind is not None:
            layers, rows = self._mind.controller.move_rows()
            plan = torch.from_numpy(np.column_stack([np.array(layers, np.int64), rows]))
        dist.broadcast(plan, src=self._first, group=self._group)
        if not self._all_agree(self._can_move(plan)):
            return False
        for layer, *row in plan.tolist():
            self._move_layer(layer, torch.tensor(row))
        return True

    def _can_move(self, plan: Tensor) -> bool:
        rows, layers = plan[:, 1:].tolist(), plan[:, 0].tolist()
        one_layer = GroupShape(
            ranks=self._shape.ranks,
            nodes=self._shape.nodes,
            layers=len(rows),
            experts=self._shape.experts,
            slots_per_rank=self._shape.slots_per_rank,
        )
        problems = list_placement_problems(rows, one_layer)
        if problems or not all(0 <= layer < self._shape.layers for layer in layers):
            logger.error("rank %d cannot move experts: %s", self._rank, problems or layers)
            return False
        return True

    def _all_agree(self, ok: bool) -> bool:
        vote = torch.tensor([int(ok)])
        dist.all_reduce(vote, op=dist.ReduceOp.MIN, group=self._group)
        return bool(vote.item())

    def _move_layer(self, layer: int, row: Tensor) -> None:
        """One layer's weights and maps, as vLLM's own rearrangement moves each layer in turn."""
        state: EplbModelState = self._model_state
        weights = state.model.expert_weights[layer]
        transferred = transfer_layer(
            old_layer_indices=state.physical_to_logical_map[layer],
            new_layer_indices=row,
            expert_weights=weights,
            expert_weights_buffer=state.expert_buffer,
            ep_group=self._device_group,
            communicator=state.communicator,
            layer_idx=layer,
        )
        move_from_buffer(
            expert_weights=weights,
            expert_weights_buffers=state.expert_buffer,
            transfer_metadata=transferred,
            new_indices=row.numpy(),
            ep_rank=self._rank,
        )
        _commit_eplb_maps_for_layer(state, row, layer)


def read_tokens_of_ranks() -> list[int]:
    """Tokens of each data-parallel rank in the pass under way, padded ones included; none where there is one rank."""
    if not is_forward_context_available():
        return []
    metadata = get_forward_context().dp_metadata
    return [] if metadata is None else [int(tokens) for tokens in metadata.num_tokens_across_dp_cpu.tolist()]
