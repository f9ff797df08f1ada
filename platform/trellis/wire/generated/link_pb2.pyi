from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class NodeKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NODE_KIND_UNSPECIFIED: _ClassVar[NodeKind]
    NODE_KIND_TRAIN: _ClassVar[NodeKind]
    NODE_KIND_EDGE: _ClassVar[NodeKind]

class Encoding(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ENCODING_UNSPECIFIED: _ClassVar[Encoding]
    ENCODING_NONE: _ClassVar[Encoding]
    ENCODING_ZSTD: _ClassVar[Encoding]

class Shortening(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SHORTENING_UNSPECIFIED: _ClassVar[Shortening]
    SHORTENING_NONE: _ClassVar[Shortening]
    SHORTENING_FLOAT16: _ClassVar[Shortening]
    SHORTENING_INT8: _ClassVar[Shortening]

class Verdict(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    VERDICT_UNSPECIFIED: _ClassVar[Verdict]
    VERDICT_ACCEPTED: _ClassVar[Verdict]
    VERDICT_DUPLICATE: _ClassVar[Verdict]
    VERDICT_STALE: _ClassVar[Verdict]
    VERDICT_REFUSED: _ClassVar[Verdict]
NODE_KIND_UNSPECIFIED: NodeKind
NODE_KIND_TRAIN: NodeKind
NODE_KIND_EDGE: NodeKind
ENCODING_UNSPECIFIED: Encoding
ENCODING_NONE: Encoding
ENCODING_ZSTD: Encoding
SHORTENING_UNSPECIFIED: Shortening
SHORTENING_NONE: Shortening
SHORTENING_FLOAT16: Shortening
SHORTENING_INT8: Shortening
VERDICT_UNSPECIFIED: Verdict
VERDICT_ACCEPTED: Verdict
VERDICT_DUPLICATE: Verdict
VERDICT_STALE: Verdict
VERDICT_REFUSED: Verdict

class JoinRequest(_message.Message):
    __slots__ = ("protocol", "node", "instance", "client", "kind", "encodings", "software")
    class SoftwareEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    ENCODINGS_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    node: str
    instance: str
    client: int
    kind: NodeKind
    encodings: _containers.RepeatedScalarFieldContainer[Encoding]
    software: _containers.ScalarMap[str, str]
    def __init__(self, protocol: _Optional[int] = ..., node: _Optional[str] = ..., instance: _Optional[str] = ..., client: _Optional[int] = ..., kind: _Optional[_Union[NodeKind, str]] = ..., encodings: _Optional[_Iterable[_Union[Encoding, str]]] = ..., software: _Optional[_Mapping[str, str]] = ...) -> None: ...

class JoinResponse(_message.Message):
    __slots__ = ("session", "client", "num_clients", "run", "max_payload_bytes", "chunk_bytes", "beat_seconds", "keep_answers")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    NUM_CLIENTS_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    MAX_PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    BEAT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    KEEP_ANSWERS_FIELD_NUMBER: _ClassVar[int]
    session: str
    client: int
    num_clients: int
    run: str
    max_payload_bytes: int
    chunk_bytes: int
    beat_seconds: float
    keep_answers: int
    def __init__(self, session: _Optional[str] = ..., client: _Optional[int] = ..., num_clients: _Optional[int] = ..., run: _Optional[str] = ..., max_payload_bytes: _Optional[int] = ..., chunk_bytes: _Optional[int] = ..., beat_seconds: _Optional[float] = ..., keep_answers: _Optional[int] = ...) -> None: ...

class WorkRequest(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: str
    def __init__(self, session: _Optional[str] = ...) -> None: ...

class WorkResponse(_message.Message):
    __slots__ = ("task", "cancel", "beat", "goodbye")
    TASK_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    BEAT_FIELD_NUMBER: _ClassVar[int]
    GOODBYE_FIELD_NUMBER: _ClassVar[int]
    task: Task
    cancel: Cancel
    beat: Beat
    goodbye: Goodbye
    def __init__(self, task: _Optional[_Union[Task, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., beat: _Optional[_Union[Beat, _Mapping]] = ..., goodbye: _Optional[_Union[Goodbye, _Mapping]] = ...) -> None: ...

class Task(_message.Message):
    __slots__ = ("id", "kind", "cell", "setup", "records", "seconds_left", "shortening", "after")
    ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    CELL_FIELD_NUMBER: _ClassVar[int]
    SETUP_FIELD_NUMBER: _ClassVar[int]
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_LEFT_FIELD_NUMBER: _ClassVar[int]
    SHORTENING_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    id: str
    kind: str
    cell: str
    setup: Payload
    records: _containers.RepeatedCompositeFieldContainer[Record]
    seconds_left: float
    shortening: Shortening
    after: str
    def __init__(self, id: _Optional[str] = ..., kind: _Optional[str] = ..., cell: _Optional[str] = ..., setup: _Optional[_Union[Payload, _Mapping]] = ..., records: _Optional[_Iterable[_Union[Record, _Mapping]]] = ..., seconds_left: _Optional[float] = ..., shortening: _Optional[_Union[Shortening, str]] = ..., after: _Optional[str] = ...) -> None: ...

class Record(_message.Message):
    __slots__ = ("name", "payload")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    name: str
    payload: Payload
    def __init__(self, name: _Optional[str] = ..., payload: _Optional[_Union[Payload, _Mapping]] = ...) -> None: ...

class Payload(_message.Message):
    __slots__ = ("digest", "size", "decoded_size", "encoding", "inline")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    DECODED_SIZE_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    INLINE_FIELD_NUMBER: _ClassVar[int]
    digest: str
    size: int
    decoded_size: int
    encoding: Encoding
    inline: bytes
    def __init__(self, digest: _Optional[str] = ..., size: _Optional[int] = ..., decoded_size: _Optional[int] = ..., encoding: _Optional[_Union[Encoding, str]] = ..., inline: _Optional[bytes] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("task_id",)
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    def __init__(self, task_id: _Optional[str] = ...) -> None: ...

class Beat(_message.Message):
    __slots__ = ("complete",)
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    complete: bool
    def __init__(self, complete: _Optional[bool] = ...) -> None: ...

class Goodbye(_message.Message):
    __slots__ = ("reason", "final")
    REASON_FIELD_NUMBER: _ClassVar[int]
    FINAL_FIELD_NUMBER: _ClassVar[int]
    reason: str
    final: bool
    def __init__(self, reason: _Optional[str] = ..., final: _Optional[bool] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("session", "digest", "offset")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    session: str
    digest: str
    offset: int
    def __init__(self, session: _Optional[str] = ..., digest: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class FetchResponse(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class SubmitRequest(_message.Message):
    __slots__ = ("header", "data")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    header: SubmitHeader
    data: bytes
    def __init__(self, header: _Optional[_Union[SubmitHeader, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class SubmitHeader(_message.Message):
    __slots__ = ("session", "task_id", "answer", "failure")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    session: str
    task_id: str
    answer: Payload
    failure: Failure
    def __init__(self, session: _Optional[str] = ..., task_id: _Optional[str] = ..., answer: _Optional[_Union[Payload, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("code", "reason")
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    code: int
    reason: str
    def __init__(self, code: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class SubmitResponse(_message.Message):
    __slots__ = ("verdict", "reason")
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    verdict: Verdict
    reason: str
    def __init__(self, verdict: _Optional[_Union[Verdict, str]] = ..., reason: _Optional[str] = ...) -> None: ...

class LeaveRequest(_message.Message):
    __slots__ = ("session", "reason", "for_good")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    FOR_GOOD_FIELD_NUMBER: _ClassVar[int]
    session: str
    reason: str
    for_good: bool
    def __init__(self, session: _Optional[str] = ..., reason: _Optional[str] = ..., for_good: _Optional[bool] = ...) -> None: ...

class LeaveResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
