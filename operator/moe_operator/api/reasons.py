"""The reasons of all conditions of a resource in a cluster: the closed set that docs/troubleshooting.md explains.

A reason that stands for an event or a condition of Kubernetes has its name there, so that people find it.
"""

from enum import StrEnum


class Reason(StrEnum):
    """Why a condition holds or does not, in one word for programs."""

    # Ready.
    SERVING = "Serving"
    SCALED_TO_ZERO = "ScaledToZero"
    NO_GATEWAY = "NoGateway"
    NO_ENDPOINT = "NoEndpoint"
    NO_ENGINE = "NoEngine"
    ENGINES_NOT_SEEN = "EnginesNotSeen"

    # Progressing.
    UPDATING = "Updating"
    ENGINES_STARTING = "EnginesStarting"
    SCHEDULING_GATED = "SchedulingGated"
    COMPLETE = "Complete"

    # Degraded, of the resource and its objects.
    AS_EXPECTED = "AsExpected"
    INVALID_SPEC = "InvalidSpec"
    REFUSED = "Refused"
    RECONCILE_ERROR = "ReconcileError"
    LEADER_WORKER_SET_MISSING = "LeaderWorkerSetMissing"
    INFERENCE_POOL_MISSING = "InferencePoolMissing"
    NOT_PERMITTED = "NotPermitted"
    FAILED_CREATE = "FailedCreate"
    FAILED_DELETE = "FailedDelete"
    PROGRESS_DEADLINE_EXCEEDED = "ProgressDeadlineExceeded"
    GATEWAYS_NOT_SCALED = "GatewaysNotScaled"

    # A resource that ends.
    DELETING = "Deleting"
    NOT_ENDING = "NotEnding"

    # Degraded, of a pod.
    UNSCHEDULABLE = "Unschedulable"
    VOLUME_NOT_PROVISIONED = "VolumeNotProvisioned"
    FAILED_ATTACH_VOLUME = "FailedAttachVolume"
    FAILED_MOUNT = "FailedMount"
    FAILED_SANDBOX = "FailedCreatePodSandBox"
    CONTAINER_CREATING = "ContainerCreating"
    IMAGE_CANNOT_BE_PULLED = "ImageCannotBePulled"
    SECRET_MISSING = "SecretMissing"
    CONTAINER_CANNOT_START = "ContainerCannotStart"
    CRASH_LOOPING = "CrashLooping"
    POD_FAILED = "PodFailed"
    NODE_NOT_READY = "NodeNotReady"
    IDENTITY_MISMATCH = "IdentityMismatch"

    # Degraded, of an engine.
    OUT_OF_MEMORY = "OutOfMemory"
    MODEL_NOT_FOUND = "ModelNotFound"
    ENGINE_FAILING = "EngineFailing"
    RANK_FAILED = "RankFailed"

    # Paused.
    PAUSED = "Paused"
    NOT_PAUSED = "NotPaused"

    # AutoscalingLimited.
    NOT_LIMITED = "NotLimited"
    NO_SIGNAL = "NoSignal"
    TOO_FEW_REPLICAS = "TooFewReplicas"
    TOO_MANY_REPLICAS = "TooManyReplicas"
    OUT_OF_BOUNDS = "OutOfBounds"
    OTHER_AUTOSCALER = "OtherAutoscaler"

    # ExpertsBalanced.
    BALANCED = "Balanced"
    DRY_RUN_WOULD_MOVE = "DryRunWouldMove"
    IMBALANCED = "Imbalanced"
    ROLLED_BACK = "RolledBack"
    MOVE_FAILED = "MoveFailed"
    NO_DECISION = "NoDecision"
    SLOW_MOVE = "SlowMove"
    VERSION_SKEW = "VersionSkew"
    OFF = "Off"
    NOT_RECORDED = "NotRecorded"
    NO_EXPERT_GROUP = "NoExpertGroup"
    NOT_SUPPORTED = "NotSupported"

    # Disaggregated.
    TRANSFERRING = "Transferring"
    NO_TRANSFERS = "NoTransfers"
    NO_PEERS = "NoPeers"
    PEERS_DIFFER = "PeersDiffer"
    TRANSFERS_FAILING = "TransfersFailing"
    CONNECTOR_MISSING = "ConnectorMissing"

    # TargetsMet.
    WITHIN_TARGETS = "WithinTargets"
    TARGETS_MISSED = "TargetsMissed"
    NO_TRAFFIC = "NoTraffic"
