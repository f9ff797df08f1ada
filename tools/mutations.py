"""Does a test notice when a protection is gone? One line is changed at a time, in a copy, and the test named must fail.

    python tools/mutations.py              all of them, and the table of docs/reliability.md
    python tools/mutations.py NAME …       these, and their rows
    python tools/mutations.py --list       their names

Exit status 1 if a mutant survives, or if the tests fail on the project as it is.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- mutations: made by tools/mutations.py -->", "<!-- mutations end -->"
PARTS = ("platform", "clients", "server", "tests", "protos", "benchmarks", "docs", "scenarios", "pyproject.toml")
PACKAGES = ("platform", "clients", "server")

PAYLOAD = "platform/trellis/wire/payload.py"
CONTENT = "platform/trellis/wire/content.py"
NODES = "platform/trellis/wire/nodes.py"
LINK = "platform/trellis/grids/_grpc_link.py"
DOOR = "platform/trellis/grids/_grpc_door.py"
SUBMISSIONS = "platform/trellis/grids/_grpc_submissions.py"
TASKS = "platform/trellis/grids/_grpc_tasks.py"
UPLOADS = "platform/trellis/grids/_grpc_uploads.py"
GRID = "platform/trellis/grids/grpc.py"
CHECKS = "platform/trellis/grids/_checks.py"
COHORT = "platform/trellis/grids/_cohort.py"
SCREENED = "platform/trellis/grids/screened.py"
SERVING = "platform/trellis/deploy/serving.py"
JOINING = "platform/trellis/deploy/joining.py"
NODE = "clients/trellis_clients/link/connection.py"
TRAINING = "clients/trellis_clients/link/training.py"
WORKING = "clients/trellis_clients/link/working.py"
EDGE_NODE = "clients/trellis_clients/link/edge_node.py"
AGENDA = "clients/trellis_clients/link/agenda.py"
STORE = "clients/trellis_clients/link/store.py"
STOPPING = "platform/trellis/deploy/stopping.py"
CONSENT = "clients/trellis_clients/link/consent.py"
CHECKPOINT = "server/trellis_server/checkpoint.py"
LOOP = "server/trellis_server/loop.py"
EXPERIMENT = "platform/trellis/experiment.py"

T_WIRE, T_LINK, T_NODES = "platform/test_wire.py", "platform/test_link.py", "platform/test_nodes.py"
T_GRPC, T_SCREENED = "e2e/test_grpc.py", "platform/test_screened.py"
T_ANSWERS, T_UPLOADS = "platform/test_link_answers.py", "platform/test_link_uploads.py"
T_RESTARTS = "platform/test_link_restarts.py"
T_DISKS, T_CLOCKS = "e2e/test_disks.py", "e2e/test_clocks.py"
T_INTRUDERS, T_RECONNECTS = "e2e/test_intruders.py", "e2e/test_reconnects.py"
T_NODE, T_FAULTS = "clients/test_link_node.py", "e2e/test_node_faults.py"
OFFENDER = f"{T_SCREENED}::test_an_offender_is_named_and_left_out_and_the_round_completes"


@dataclass(frozen=True)
class Mutant:
    """A protection, and how to switch it off.

    Attributes:
        name: of the protection.
        file: its source.
        old: stands there exactly once.
        new: in its place, the protection is gone.
        test: in ``tests``; must pass before and fail after.
    """

    name: str
    file: str
    old: str
    new: str
    test: str


MUTANTS = [
    # what comes over the wire
    Mutant("digest of a payload", PAYLOAD, "if self._sha.hexdigest() != payload.digest:", "if False:",
           f"{T_WIRE}::test_other_bytes_than_announced_are_refused"),
    Mutant("limit of a payload's size", PAYLOAD, "if max(payload.size, payload.decoded_size) > limit:", "if False:",
           f"{T_WIRE}::test_a_payload_that_claims_too_much_is_refused_before_a_byte_of_it"),
    Mutant("encoding of a payload", PAYLOAD, "if payload.encoding not in (pb.ENCODING_NONE, pb.ENCODING_ZSTD):",
           "if False:", f"{T_ANSWERS}::test_a_wrong_payload_fails_its_client_and_nobody_else"),
    Mutant("more bytes than announced", PAYLOAD, "if self.received > self.payload.size:", "if False:",
           f"{T_WIRE}::test_bytes_after_the_end_are_refused_when_they_come"),
    Mutant("growth while decoding", PAYLOAD, "if self.decoded > self.payload.decoded_size:", "if False:",
           f"{T_WIRE}::test_few_bytes_that_stand_for_many_are_caught_on_the_way"),
    Mutant("arrays that overlap", CONTENT, "or start != covered or", "or",
           f"{T_WIRE}::test_overlapping_arrays_and_gaps_are_refused"),
    # the protocol
    Mutant("version of the protocol", DOOR, "if request.protocol != methods.PROTOCOL:", "if False:",
           f"{T_LINK}::test_calls_out_of_order_get_a_status"),
    Mutant("session of a call", LINK, "node = self.sessions.get(session)",
           "node = self.sessions.get(session) or next(iter(self.nodes.values()), None)",
           f"{T_LINK}::test_open_tasks_come_again_on_a_new_stream_and_after_a_new_join"),
    Mutant("answers known to be duplicates", TASKS,
           "return self._verdicts[client].get(task) if client in self._verdicts else None", "return None",
           f"{T_LINK}::test_an_answer_counts_once"),
    Mutant("a refused answer stays refused", SUBMISSIONS,
           "pb.VERDICT_DUPLICATE if verdict == pb.VERDICT_ACCEPTED else verdict", "pb.VERDICT_DUPLICATE",
           f"{T_ANSWERS}::test_a_refused_answer_stays_refused"),
    Mutant("answers of before wait for their question", SUBMISSIONS,
           "            await self._link.asked.wait()", "            ...",
           f"{T_RESTARTS}::test_an_answer_from_before_the_server_went_away_waits_for_its_question"),
    Mutant("what counted is in the checkpoint", LOOP, 'snapshot.values.get("grid")', "{}",
           f"{T_RECONNECTS}::test_server_and_node_are_killed_between_the_checkpoint_and_the_nodes_note"),
    Mutant("the task says which state counts", LINK, "each.task.after = after", "pass",
           f"{T_RECONNECTS}::test_a_round_that_is_done_again_without_a_client_leaves_no_trace_of_its_lost_answer"),
    Mutant("a replay is whole once the server asks", LINK, "if new and self.asked.is_set():", "if new:",
           f"{T_RESTARTS}::test_a_replay_says_that_it_is_whole_once_the_server_asks"),
    Mutant("a node that is another client now", DOOR,
           'self._link.fail_tasks(before, f"its node is client {client} from now on")', "pass",
           f"{T_RESTARTS}::test_a_node_that_comes_back_as_another_client_ends_its_task"),
    Mutant("stale verdict", SUBMISSIONS, 'VERDICT_STALE, reason="nobody waits',
           'VERDICT_ACCEPTED, reason="nobody waits',
           f"{T_LINK}::test_a_node_answers_for_itself_only"),
    Mutant("one machine for a name", DOOR, "if before and before.connected and before.instance != request.instance:",
           "if False:", f"{T_LINK}::test_calls_out_of_order_get_a_status"),
    Mutant("lost nodes fail their tasks", LINK,
           "if node.tasks and node.absent_for(self.settings.leave_after_s):", "if False:",
           f"{T_LINK}::test_a_node_that_stays_away_fails_its_task_and_a_deadline_ends_the_rest"),
    Mutant("room for uploads", UPLOADS, "if self.used and self.used + count > self.size and self._first is not upload:",
           "if False:", f"{T_UPLOADS}::test_uploads_wait_for_room_and_none_is_lost"),
    Mutant("an upload ends with its task", TASKS, "            self.upload.cancel()", "            pass",
           f"{T_UPLOADS}::test_an_upload_that_stalls_holds_up_nobody"),
    Mutant("unread answers take their room", UPLOADS, "self._first is None and not self.unread", "self._first is None",
           f"{T_UPLOADS}::test_nothing_goes_beyond_the_room_while_answers_wait_to_be_read"),
    Mutant("who waits beyond the room moves", UPLOADS, "if seconds > GRACE_S and", "if False and",
           f"{T_UPLOADS}::test_one_upload_goes_beyond_the_room_at_a_time_and_only_while_it_moves"),
    Mutant("a few downloads a node", LINK, "if node.fetches >= FETCHES:", "if False:",
           f"{T_UPLOADS}::test_a_payload_that_is_not_taken_is_let_go"),
    Mutant("seats over restarts", LINK, "settings.folder / SEATS if settings.folder else None", "None",
           f"{T_RESTARTS}::test_nodes_find_their_clients_after_a_restart"),
    Mutant("a seat during a blip", DOOR,
           "if given is None and not other.absent_for(self._link.settings.leave_after_s):", "if False:",
           f"{T_RESTARTS}::test_a_seat_is_its_nodes_for_a_while_and_then_free"),
    Mutant("too few clients", GRID, "if time.monotonic() - since > self.link.settings.give_up_after_s:",
           "if time.monotonic() - since > 1000 * self.link.settings.give_up_after_s:",
           f"{T_LINK}::test_too_few_clients_end_the_run_with_a_reason"),
    Mutant("deadline of a round", GRID, "deadline = None if timeout is None else time.monotonic() + timeout",
           "deadline = None if timeout is None else time.monotonic() + 4 * timeout",
           f"{T_CLOCKS}::test_a_clock_that_jumps_by_ten_minutes_moves_no_deadline"),
    Mutant("monotonic clock", GRID, "import time\n",
           "import time as _time\nclass time:\n    monotonic = staticmethod(lambda: _time.time())\n",
           f"{T_CLOCKS}::test_a_clock_that_jumps_by_ten_minutes_moves_no_deadline"),
    Mutant("pauses drawn at random", NODE, "return self._jitter.uniform(0, min(", "return max(0, min(",
           f"{T_RECONNECTS}::test_pauses_between_tries_grow_to_a_limit_and_are_drawn_at_random"),
    # who gets in
    Mutant("unknown token", NODES, "kept is None or _same(kept, shown)", "kept is None or shown is not None",
           f"{T_NODES}::test_others_are_refused"),
    Mutant("revoked node at the door", NODES, "if entry.revoked:", "if False:",
           f"{T_NODES}::test_a_revoked_or_expired_node_is_shut_out_without_a_restart"),
    Mutant("revoked node inside", NODES, "if entry is None or entry.revoked:", "if entry is None:",
           f"{T_NODES}::test_a_revoked_or_expired_node_is_shut_out_without_a_restart"),
    Mutant("replaced token inside", NODES, "if entry.credential != credential:", "if False:",
           f"{T_NODES}::test_what_changed_of_a_node_that_is_inside_is_noticed"),
    Mutant("token and certificate", NODES, "and all(kept is None", "and any(kept is None",
           f"{T_NODES}::test_an_entry_with_a_token_and_a_certificate_wants_both"),
    Mutant("clients of others on the list", DOOR, "if asked in others:", "if False:",
           f"{T_RESTARTS}::test_clients_that_the_list_gives_to_others_are_not_to_be_had"),
    Mutant("last day of credentials", NODES, "self.expires is not None and (now", "False and (now",
           f"{T_INTRUDERS}::test_another_host_name_an_expired_token_and_old_tls_are_refused"),
    Mutant("name that is not the token's", DOOR, 'if request.node not in ("", name):', "if False:",
           f"{T_INTRUDERS}::test_another_host_name_an_expired_token_and_old_tls_are_refused"),
    Mutant("nodes' certificates under --mutual-tls", SERVING, "require_client_auth=authority is not None,",
           "require_client_auth=False,",
           f"{T_INTRUDERS}::test_under_mutual_tls_a_node_shows_a_certificate_of_the_right_authority"),
    Mutant("--insecure on loopback only", SERVING, "if insecure and not is_loopback(address) and not beyond_loopback:",
           "if False:",
           f"{T_NODES}::test_a_link_is_closed_unless_told_otherwise"),
    Mutant("no TLS without an allow-list", SERVING, "    if allow is None:\n", "    if False:\n",
           f"{T_NODES}::test_a_link_is_closed_unless_told_otherwise"),
    Mutant("no token in the clear", JOINING, "if self.token and not local:", "if False:",
           f"{T_NODES}::test_a_node_sends_its_token_to_nobody_in_the_clear"),
    Mutant("consent by digest", CONSENT, " and digest(path.read_bytes()) in self.allowed", "",
           f"{T_GRPC}::test_code_from_a_file_runs_only_with_the_operators_consent"),
    Mutant("a device's weights are the source's", EDGE_NODE, "if wanted is None or device.weights == wanted:",
           "if True:", "e2e/test_edge_link.py::test_a_model_of_other_weights_is_refused_and_the_clouds_is_taken"),
    # the admission gate and the round
    Mutant("gate: finite", CHECKS, "return None if reply.expected is None else reply.measured.nonfinite",
           "return None", OFFENDER),
    Mutant("gate: names", CHECKS, "if reply.expected is None or reply.as_expected:\n        return None",
           "if True:\n        return None", OFFENDER),
    Mutant("gate: weight", CHECKS, "return None if 1 <= value <= most else", "return None if True else", OFFENDER),
    Mutant("gate: norm", COHORT, "if norm > cohort.limit else None", "if False else None", OFFENDER),
    Mutant("gate: second reply", SCREENED, "if answered in self.closed:", "if False:",
           f"{T_SCREENED}::test_a_second_reply_is_dropped"),
    Mutant("quorum", LOOP, "needed = math.ceil(self.scenario.rounds.quorum * cohort)", "needed = 0",
           "e2e/test_failures.py::test_a_missed_quorum_ends_the_run_with_a_reason_and_it_resumes"),
    # disks and states
    Mutant("state counts once accepted", TRAINING, "if verdict in (pb.VERDICT_ACCEPTED, pb.VERDICT_DUPLICATE):",
           "if True:", f"{T_FAULTS}::test_a_state_counts_once_the_server_says_that_the_answer_does"),
    Mutant("asking what counts after a crash", TRAINING, "for known in store.unsettled():", "for known in list[str]():",
           f"{T_FAULTS}::test_a_node_that_died_before_it_noted_a_verdict_asks_for_it"),
    Mutant("state after the answer that the server names", TRAINING, 'if not task.HasField("after"):', "if True:",
           f"{T_FAULTS}::test_a_task_starts_from_the_state_after_the_answer_that_the_server_names"),
    Mutant("a fault in a task ends no node", WORKING, "except Exception as error:", "except LookupError as error:",
           f"{T_FAULTS}::test_a_fault_of_the_node_itself_is_logged_and_fails_the_task"),
    Mutant("what a new stream does not bring is cancelled", AGENDA, "for task, known in self._known.items():",
           "for task, known in dict[str, _Known]().items():",
           f"{T_NODE}::test_what_a_new_stream_does_not_bring_again_is_cancelled"),
    Mutant("an answer under way is asked for", AGENDA, "and not known.answering and", "and",
           f"{T_FAULTS}::test_a_verdict_that_was_lost_with_the_connection_is_asked_for"),
    Mutant("calls end with their task", AGENDA, "                call.cancel()\n", "                pass\n",
           f"{T_NODE}::test_an_answer_that_the_server_lets_wait_ends_with_its_task_and_its_node"),
    Mutant("a second signal ends a node", STOPPING, "            os._exit(AT_ONCE)\n", "            return\n",
           f"{T_FAULTS}::test_sigterm_ends_a_device_and_a_second_one_at_once"),
    Mutant("answers are kept", STORE, 'read_bytes() if task in self._index["answers"] else None',
           'read_bytes() if task == "" else None',
           f"{T_FAULTS}::test_an_answer_that_cannot_be_handed_in_waits_on_the_disk"),
    Mutant("names of a node's files are on the disk", STORE, "        _sync(path.parent)\n", "",
           f"{T_NODE}::test_files_are_on_the_disk_under_their_names"),
    Mutant("one process for a node's folder", STORE, "fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass",
           f"{T_NODE}::test_one_process_holds_a_folder"),
    Mutant("a state for each client", STORE, '-client-{client}"', '"',
           f"{T_NODE}::test_private_state_belongs_to_a_client"),
    Mutant("ids that name files", STORE, "if not re.fullmatch(TASK, task):", "if False:",
           f"{T_NODE}::test_what_comes_from_the_server_names_no_file_elsewhere"),
    Mutant("node's files whole or not at all", STORE, 'temporary.open("wb")', 'path.open("wb")',
           f"{T_DISKS}::test_a_file_is_written_whole_or_not_at_all"),
    Mutant("node's disk is full", WORKING, "except OSError as error:  # an", "except KeyError as error:  # an",
           f"{T_DISKS}::test_a_node_whose_disk_is_full_fails_by_itself_until_there_is_room"),
    Mutant("digest of a checkpoint", CHECKPOINT, 'if hashlib.sha256(blob).hexdigest() != entry["sha256"]:', "if False:",
           "server/test_checkpoint.py::test_a_damaged_state_gives_the_one_before_it"),
    Mutant("checkpoint whole or not at all", CHECKPOINT, 'folder / f"{name}.tmp"', "folder / name",
           "server/test_checkpoint.py::test_a_crash_at_any_write_leaves_the_previous_state"),
    Mutant("server's disk is full", EXPERIMENT, "if error.errno not in DISK:", "if True:",
           f"{T_DISKS}::test_a_disk_that_takes_no_checkpoint"),
]  # fmt: skip


def copy(folder: Path) -> None:
    """Copy what the tests need."""
    leave = shutil.ignore_patterns("__pycache__", "runs", "*.egg-info")
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, folder / part, ignore=leave)
        else:
            shutil.copy(source, folder / part)


def passes(folder: Path, tests: list[str]) -> tuple[bool, str]:
    """Run tests of the copy, on the copy's packages; return whether all passed, and what pytest said."""
    found = os.pathsep.join(str(folder / package) for package in PACKAGES)
    environment = {**os.environ, "PYTHONPATH": found, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--timeout", "120"]
    try:
        done = subprocess.run(
            [*command, *(f"tests/{test}" for test in tests)],
            cwd=folder, env=environment, capture_output=True, text=True, timeout=900, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return False, "it did not end"
    if done.returncode not in (0, 1):
        return False, f"pytest ended with {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    skipped = " skipped" in done.stdout and " passed" not in done.stdout
    return done.returncode == 0 and not skipped, done.stdout[-2000:]


def apply(folder: Path, mutant: Mutant) -> str:
    """Change the line in the copy; return the text before."""
    path = folder / mutant.file
    before = path.read_text()
    count = before.count(mutant.old)
    if count != 1:
        raise SystemExit(f"{mutant.name}: {mutant.file} holds {mutant.old!r} {count} times, not once")
    path.write_text(before.replace(mutant.old, mutant.new))
    return before


def table(rows: list[tuple[Mutant, str]]) -> str:
    """Return the page's table."""
    lines = ["| protection | in | test | when it is off |", "|---|---|---|---|"]
    for mutant, said in rows:
        file, _, test = mutant.test.partition("::")
        test = test.removeprefix("test_")
        source = f"[{Path(mutant.file).name}](../{mutant.file})"
        lines.append(f"| {mutant.name} | {source} | [`{test}`](../tests/{file}) | {said} |")
    return "\n".join(lines)


def write(found: dict[str, str]) -> None:
    """Write what was found into the page; rows of other protections keep what they say."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    old, _, after = rest.partition(END)
    known = {cells[1].strip(): cells[-2].strip() for line in old.splitlines() if len(cells := line.split("|")) > 2}
    rows = [(mutant, found.get(mutant.name) or known.get(mutant.name, "not tried")) for mutant in MUTANTS]
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(rows)}\n\n{END}{after}")


def main(arguments: list[str]) -> int:
    say = sys.stdout.write
    if "--list" in arguments:
        say("".join(f"{mutant.name}\n" for mutant in MUTANTS))
        return 0
    if unknown := sorted(set(arguments) - {mutant.name for mutant in MUTANTS}):
        raise SystemExit(f"no protection is called {', '.join(map(repr, unknown))}; --list names them")
    chosen = [mutant for mutant in MUTANTS if not arguments or mutant.name in arguments]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        copy(folder)
        for mutant in chosen:  # all can be applied, before the first is tried
            (folder / mutant.file).write_text(apply(folder, mutant))
        well, said = passes(folder, sorted({mutant.test for mutant in chosen}))
        if not well:
            say(f"the tests do not pass on the project as it is:\n{said}\n")
            return 1
        found: dict[str, str] = {}
        for mutant in chosen:
            started = time.monotonic()
            before = apply(folder, mutant)
            survived, said = passes(folder, [mutant.test])
            (folder / mutant.file).write_text(before)
            if said.startswith("pytest ended"):
                raise SystemExit(f"{mutant.name}: {said}")
            found[mutant.name] = "**nothing is noticed**" if survived else "fails"
            say(f"{'SURVIVED' if survived else 'killed  '}  {mutant.name}  ({time.monotonic() - started:.0f} s)\n")
            sys.stdout.flush()
    write(found)
    return int(any(said != "fails" for said in found.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
