"""One rank of an expert group inside vLLM: it records load, enters the sync rounds, and moves weights with all ranks.

`join_expert_group`, called by the plugin in each process of an engine with an expert group, replaces vLLM's own
balancer: `EplbState.add_model` makes an `ExpertGroup`, `prepare_forward` and `step` report each pass to it. vLLM's load
window and policy are not used; its counters, maps, buffer and communicator are. Its asynchronous worker, where one was
started, is never woken: a move is cut into slices that fit into a step.

Decisions are in `moe_agent.experts`; what touches vLLM and torch is here. Every collective here is entered by all
ranks, because each has read the same sync round (`moe_agent.experts.sync_round`). An error during a move ends the
engine: weights in an unknown state must not answer a request, and the agent restarts the whole group.
"""

import os
import time
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from moe_contract.engine_process import RUN_DIR_VARIABLE
from moe_kernels.expert_load import map_and_record
from moe_scheduling.expert.gpu_priors import WorkCosts, work_prior
from torch import Tensor
from vllm.distributed.eplb.eplb_state import EplbModelState, EplbState, _commit_eplb_maps_for_layer
from vllm.distributed.eplb.rebalance_execute import move_from_buffer, transfer_layer
from vllm.distributed.parallel_state import get_ep_group, get_node_count, get_tp_group
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.router import base_router
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.v1.worker.gpu_worker import Worker

from moe_agent.experts.coordinator import Coordinator, checksum
from moe_agent.experts.directive import GroupShape, list_placement_errors
from moe_agent.experts.document import experts_path
from moe_agent.experts.load import RankLoadReport, Slots
from moe_agent.experts.obstacle import note_obstacle
from moe_agent.experts.planning import Decider, MeasuredCosts
from moe_agent.experts.step_times import WorkMeter, work_costs
from moe_agent.experts.sync_round import RoundAction, SyncRound, pack_round, round_size, unpack_round
from moe_agent.shared_memory.expert_record import NOT_ASKED, ExpertRecordWriter, ExpertState
from moe_agent.vllm.balanceable import describe_obstacle
from moe_agent.vllm.idle_replicas import leave_out_idle
from moe_agent.vllm.load_recorder import LoadRecorder
from moe_agent.vllm.version import replace_attribute

logger = init_logger(__name__)

# Assumed speed of moves until the first one has been measured.
FIRST_MOVE_BYTES_PER_S = 1e9
# Between passes that are further apart the engine was idle.
MAX_STEP_S = 2.0


def join_expert_group(meter: WorkMeter) -> None:
    """Replaces vLLM's balancer by expert groups in this process; `meter` learns the cost of expert work."""
    groups: dict[int, ExpertGroup] = {}
    add_model, prepare_forward, step = EplbState.add_model, EplbState.prepare_forward, EplbState.step
    load_model, execute_dummy_batch = Worker.load_model, Worker.execute_dummy_batch

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

    def load_and_check(self: Worker, **options: Any) -> None:
        load_model(self, **options)
        if self.parallel_config.enable_eplb and not groups:
            refuse_to_balance(self.model_config)

    def execute_unrecorded(self: Worker) -> None:
        for group in groups.values():
            with group.recorder.paused():
                execute_dummy_batch(self)
            return
        execute_dummy_batch(self)

    replace_attribute(EplbState, "add_model", add_and_join)
    replace_attribute(EplbState, "prepare_forward", prepare_and_note)
    replace_attribute(EplbState, "step", end_pass)
    replace_attribute(Worker, "load_model", load_and_check)
    replace_attribute(Worker, "execute_dummy_batch", execute_unrecorded)
    replace_attribute(base_router, "eplb_map_to_physical_and_record", map_and_record)


def refuse_to_balance(model_config: Any) -> None:
    """Ends a rank whose loaded model cannot be balanced; with the note the engine starts again without the balancer."""
    obstacle = describe_obstacle(model_config.architecture)
    note_obstacle(Path(os.environ[RUN_DIR_VARIABLE]), obstacle)
    raise RuntimeError(f"{obstacle}; the next start goes without the balancer")


class ExpertGroup:
    """One rank's part in an expert group; made on all ranks at the same time, while they load the model."""

    def __init__(self, state: EplbState, run_dir: Path, meter: WorkMeter) -> None:
        self._model_state = next(iter(state.model_states.values()))
        self.on_cpu = state.device.type == "cpu"
        group = get_ep_group()
        self._group, self._device_group = group.cpu_group, group.device_group
        self._rank, self._first = group.rank_in_group, group.ranks[0]
        self._meter, self._run_dir = meter, run_dir
        self._shape = self._read_shape(group.world_size)
        assert state.should_record_tensor is not None, "vLLM makes it with the balancer"
        self.recorder = LoadRecorder(self._model_state, state.should_record_tensor, self._shape.experts)
        self._passes = 0
        self._next_round = 1
        self._real_tokens = 0
        self._all_tokens: list[int] = []
        self._begun_s = self._ended_s = 0.0
        self._report: Tensor | None = None
        self._report_head = torch.zeros(2, dtype=torch.int64)
        self._gathering: tuple[dist.Work, list[Tensor]] | None = None
        self._routing: list[Tensor] | None = None
        self._record = self._open_record(state)
        self._coordinator = self._make_coordinator() if self._rank == 0 else None
        self._warn_of_monolithic()
        self._capture_tokens()

    # 1. The group.

    def _read_shape(self, ranks: int) -> GroupShape:
        model = self._model_state.model
        return GroupShape(
            ranks=ranks,
            nodes=get_node_count(),
            layers=model.num_moe_layers,
            experts=model.num_logical_experts,
            slots_per_rank=model.num_local_physical_experts,
        )

    def _runner(self, layer: int) -> Any:
        return self._model_state.model.moe_layers[layer]

    def _warn_of_monolithic(self) -> None:
        for layer in range(self._shape.layers):
            runner = self._runner(layer)
            if runner.is_monolithic or not isinstance(runner.router, BaseRouter):
                logger.warning("The kernel of %s routes by itself: its load is not recorded", runner.layer_name)

    def _open_record(self, state: EplbState) -> ExpertRecordWriter | None:
        """Opens the record for the scheduler: the first of the ranks that it drives writes it."""
        if get_tp_group().rank_in_group != 0:
            return None
        return ExpertRecordWriter(self._run_dir, state.parallel_config.data_parallel_index, ExpertState())

    def _make_coordinator(self) -> Coordinator:
        sharing = 1 if self._runner(0).moe_config.is_sequence_parallel else get_tp_group().world_size
        placement = self._placement()
        return Coordinator(self._run_dir, self._shape, placement, self._costs(), Decider().decide, sharing)

    def _costs(self) -> MeasuredCosts:
        """Returns the costs assumed before anything was measured."""
        expert_bytes = sum(weight[0].nbytes for weight in self._model_state.model.expert_weights[0])
        move_s = expert_bytes / FIRST_MOVE_BYTES_PER_S
        return MeasuredCosts(token_s=0.0, remote_token_s=0.0, internode_token_s=0.0, move_s=move_s)

    @cached_property
    def _prior(self) -> WorkCosts | None:
        """Costs of expert work assumed on this GPU."""
        if self.on_cpu or not torch.cuda.is_available():
            return None
        weights = list(self._model_state.model.expert_weights[0])
        element_type = str(max(weights, key=lambda weight: weight[0].nbytes).dtype).removeprefix("torch.")
        return work_prior(torch.cuda.get_device_name(), sum(weight[0].nbytes for weight in weights), element_type)

    def _placement(self) -> Slots:
        placement: Slots = self._model_state.physical_to_logical_map.cpu().numpy().astype(np.int64)
        return placement

    # 2. Each pass.

    def begin_pass(self, real_tokens: int) -> None:
        """Begins a pass with this number of real tokens of this rank."""
        self._real_tokens, self._begun_s = real_tokens, time.perf_counter()
        if self._routing is not None:
            self._routing.clear()

    def end_pass(self, is_dummy: bool) -> None:
        """Ends a pass. All ranks end the same passes in the same order."""
        real_tokens = 0 if is_dummy else self._real_tokens
        now_s = time.perf_counter()
        # A device works on while the host goes ahead: there a step lasts from one end of a pass to the next.
        step_s, self._ended_s = now_s - (self._begun_s if self.on_cpu else self._ended_s), now_s
        if self._coordinator is not None and self.recorder.on and real_tokens and step_s < MAX_STEP_S:
            self._learn_step(self._coordinator, self._all_tokens or [real_tokens], step_s)
        if self._routing and real_tokens:
            self._hand_over_routing(self._routing)
        self._passes += 1
        self.recorder.end_pass()
        if self._passes >= self._next_round:
            self._sync()

    def _learn_step(self, coordinator: Coordinator, tokens: list[int], step_s: float) -> None:
        most = max(tokens)
        coordinator.controller.step_took(self._passes, sum(tokens), most, step_s)
        if not self.on_cpu:
            # An upper bound of the cost of expert work: all time of the step attributed to it.
            self._meter.add(most * self._runner(0).moe_config.experts_per_token * self._shape.layers, step_s)

    def _capture_tokens(self) -> None:
        """On a CPU the tokens of all ranks are read while the first layer runs; a CUDA graph runs no Python."""
        if self.on_cpu:
            self._runner(0).router.set_capture_fn(self._note_tokens)

    def _note_tokens(self, _ids: Tensor) -> None:
        if self.recorder.on:
            self._all_tokens = read_tokens_of_ranks()

    # Affinity, on request: the routing of some passes that run outside CUDA graphs.

    def _switch_routing(self) -> None:
        """Begins or ends to capture the routing of this rank, as the coordinator wants it."""
        wanted = self._coordinator is not None and self._coordinator.wants_routing
        if wanted is (self._routing is not None):
            return
        self._routing = [] if wanted else None
        for layer in range(self._shape.layers):
            self._runner(layer).router.set_capture_fn(partial(self._capture, layer) if wanted else None)
        if not wanted:
            self._capture_tokens()

    def _capture(self, layer: int, ids: Tensor) -> None:
        if layer == 0:
            self._note_tokens(ids)
        if self._routing is not None and len(self._routing) == layer:
            self._routing.append(ids[: self._real_tokens].clone())

    def _hand_over_routing(self, routing: list[Tensor]) -> None:
        assert self._coordinator is not None
        if len(routing) == self._shape.layers and self._coordinator.wants_routing:
            # vLLM computes in a stream of its own, which the stream of the coordinator's thread does not wait for.
            made = None if self.on_cpu else torch.cuda.Event()  # type: ignore[no-untyped-call]
            if made is not None:
                made.record()
            self._coordinator.add_routing(partial(_read_routing, list(routing), made))

    # 3. Sync rounds.

    def _sync(self) -> None:
        begun_s = time.perf_counter()
        self._continue_gather()
        content = self._share_round()
        self._next_round = self._passes + content.next_in
        self.recorder.switch(content.recording)
        self._meter.on = content.recording
        self._switch_routing()
        if content.action is RoundAction.GATHER:
            self._begin_gather()
        elif content.action is RoundAction.MOVE:
            moved = self._move(content)
            if self._coordinator is not None:
                self._coordinator.controller.moved(time.perf_counter() - begun_s, moved)
        self._publish_to_scheduler(content)

    def _share_round(self) -> SyncRound:
        numbers = torch.zeros(round_size(self._shape.ranks), dtype=torch.float64)
        if self._coordinator is not None:
            self._coordinator.controller.learn_work(work_costs(self._meter.costs, self._prior))
            numbers = torch.from_numpy(pack_round(self._coordinator.sync_round(self._passes)))
        dist.broadcast(numbers, src=self._first, group=self._group)
        return unpack_round(numbers.numpy())

    def _publish_to_scheduler(self, content: SyncRound) -> None:
        if self._record is None:
            return
        ranks = get_tp_group().world_size
        pressure = max(content.pressures[self._rank : self._rank + ranks])
        version = content.config_version if self._is_beside_first else NOT_ASKED
        self._record.write(ExpertState(config_version=version, balance=content.balance, pressure=pressure))

    @cached_property
    def _is_beside_first(self) -> bool:
        """Whether the settings of this node's agent are those of the group; known in the first round."""
        return experts_path(self._run_dir).exists()

    # A gather takes three rounds, so that no step waits for it: counts are copied to the host, sent, delivered.

    def _begin_gather(self) -> None:
        counts, passes = self.recorder.take()
        self._report = counts
        self._report_head = torch.tensor([checksum(self._placement()), passes])

    def _continue_gather(self) -> None:
        if self._gathering is not None:
            self._deliver(*self._gathering)
            self._gathering = None
        elif self._report is not None:
            self._gathering = self._send(self._report)
            self._report = None

    def _send(self, counts: Tensor) -> tuple[dist.Work, list[Tensor]]:
        mine = torch.cat([self._report_head, counts.flatten().long()])
        everyone = [] if self._coordinator is None else [torch.empty_like(mine) for _ in range(self._shape.ranks)]
        given = everyone or None
        work = dist.gather(mine, given, dst=self._first, group=self._group, async_op=True)
        assert work is not None
        # A sent tensor must live until it has arrived.
        return work, everyone or [mine]

    def _deliver(self, work: dist.Work, reports: list[Tensor]) -> None:
        work.wait()
        if self._coordinator is not None:
            self._coordinator.controller.gathered([self._read_report(row.numpy()) for row in reports])

    def _read_report(self, numbers: Slots) -> RankLoadReport:
        tokens = numbers[2:].reshape(self._shape.layers, self._shape.experts)
        return RankLoadReport(tokens=tokens, passes=int(numbers[1]), checksum=int(numbers[0]))

    # 4. A move.

    def _move(self, content: SyncRound) -> bool:
        """Moves the layers of a round; returns False, with nothing moved, where a rank cannot take part."""
        plan = torch.zeros((content.layers, 1 + self._shape.slots), dtype=torch.int64)
        if self._coordinator is not None:
            layers, rows = self._coordinator.controller.move_rows()
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
        problems = list_placement_errors(rows, one_layer)
        if problems or not all(0 <= layer < self._shape.layers for layer in layers):
            logger.error("rank %d cannot move experts: %s", self._rank, problems or layers)
            return False
        return True

    def _all_agree(self, ok: bool) -> bool:
        vote = torch.tensor([int(ok)])
        dist.all_reduce(vote, op=dist.ReduceOp.MIN, group=self._group)
        return bool(vote.item())

    def _move_layer(self, layer: int, row: Tensor) -> None:
        """Moves one layer's weights and maps, as vLLM's own rearrangement does layer by layer."""
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
        leave_out_idle(state.logical_to_physical_map[layer], state.logical_replica_count[layer], row, self._shape.ranks)


def _read_routing(routing: list[Tensor], made: torch.cuda.Event | None) -> Slots:
    """Returns the routing of a pass [layer, token, place], once the device has made it."""
    if made is not None:
        made.synchronize()
    chosen: Slots = torch.stack(routing).cpu().numpy()
    return chosen


def read_tokens_of_ranks() -> list[int]:
    """Returns the tokens of each data-parallel rank in the present pass, padded ones included; [] with one rank."""
    if not is_forward_context_available():
        return []
    metadata = get_forward_context().dp_metadata
    return [] if metadata is None else [int(tokens) for tokens in metadata.num_tokens_across_dp_cpu.tolist()]
