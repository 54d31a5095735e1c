//! The lock order: which ranks may be held when another is taken. This is the only copy of the
//! table; the one in `ARCHITECTURE.md` is the output of [`markdown_table`].

use std::fmt::Write as _;
#[cfg(any(debug_assertions, feature = "lock-check"))]
use std::panic::Location;

/// A class of locks, outermost first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum Rank {
    /// Virtual: this thread runs a pool job.
    Job,
    Vm,
    Workspace,
    CreateVm,
    ImageOps,
    /// Virtual: this thread waits for a pool job.
    JobWait,
    /// Virtual: this thread is about to talk to a guest.
    GuestIo,
    /// Virtual: this thread is about to talk to a VMM.
    VmmApi,
    /// Virtual: this thread is about to run a host command.
    HostCmd,
    /// Virtual: this thread waits for a commit to be durable.
    DurableWait,
    /// Virtual: this thread touches a file, a socket or a process, or sleeps. See
    /// [`may_block`](super::may_block).
    Blocking,
    /// Virtual: this thread logs.
    Log,
    Store,
    Ops,
    Pool,
    Admission,
    Sessions,
    /// The runtime records of VMs: cancel sets and boot tokens.
    Runtimes,
    Consoles,
    Connections,
    /// The pool of tap devices.
    Taps,
    /// Virtual: this thread is in a condition wait.
    CondWait,
}
use Rank::*;

/// A set of ranks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RankSet(u32);

impl RankSet {
    pub const EMPTY: Self = Self(0);
    pub const fn of(ranks: &[Rank]) -> Self {
        let mut bits = 0;
        let mut i = 0;
        while i < ranks.len() {
            bits |= 1 << ranks[i] as u32;
            i += 1;
        }
        Self(bits)
    }
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
    pub const fn contains(self, rank: Rank) -> bool {
        self.0 & (1 << rank as u32) != 0
    }
    pub fn iter(self) -> impl Iterator<Item = Rank> {
        Rank::ALL.into_iter().filter(move |r| self.contains(*r))
    }
}

/// The feature `one-lock` is the benchmark's negative control: an import then holds its VM's lock
/// throughout, so the table has to allow that.
const ONE_LOCK: RankSet = if cfg!(feature = "one-lock") {
    RankSet::of(&[Vm])
} else {
    RankSet::EMPTY
};

impl Rank {
    pub const ALL: [Rank; 22] = [
        Job,
        Vm,
        Workspace,
        CreateVm,
        ImageOps,
        JobWait,
        GuestIo,
        VmmApi,
        HostCmd,
        DurableWait,
        Blocking,
        Log,
        Store,
        Ops,
        Pool,
        Admission,
        Sessions,
        Runtimes,
        Consoles,
        Connections,
        Taps,
        CondWait,
    ];

    /// Returns the ranks that may be held when this one is taken; any other held rank is a
    /// violation. Two ranks that do not list each other are therefore never held together.
    pub const fn under(self) -> RankSet {
        match self {
            Job | Vm => RankSet::EMPTY,
            Workspace => ONE_LOCK,
            CreateVm | ImageOps | VmmApi | HostCmd => RankSet::EMPTY,
            JobWait | DurableWait => RankSet::of(&[Workspace]).and(ONE_LOCK),
            GuestIo => RankSet::of(&[Job]),
            Blocking | Log => RankSet::of(&[
                Job,
                Workspace,
                JobWait,
                GuestIo,
                VmmApi,
                HostCmd,
                DurableWait,
            ])
            .and(ONE_LOCK),
            Store => RankSet::of(&[Vm, Workspace, CreateVm, DurableWait]),
            Ops => RankSet::of(&[Job, Vm, GuestIo, HostCmd]),
            Pool => RankSet::of(&[Workspace, JobWait]).and(ONE_LOCK),
            Sessions => RankSet::of(&[Job, GuestIo]),
            Runtimes => RankSet::of(&[Job, Vm, ImageOps]),
            Consoles => RankSet::of(&[VmmApi]),
            Admission | Connections | Taps => RankSet::EMPTY,
            CondWait => RankSet::of(&[Workspace, JobWait, DurableWait]).and(ONE_LOCK),
        }
    }

    /// True if this rank is not a lock but states what the thread is doing.
    pub const fn is_virtual(self) -> bool {
        matches!(
            self,
            Job | JobWait | GuestIo | VmmApi | HostCmd | DurableWait | Blocking | Log | CondWait
        )
    }

    /// True for an activity that any thread may perform if it holds no lock except a workspace's.
    /// The test suite need not observe each edge to such a rank.
    #[cfg(any(test, feature = "fakes"))]
    pub const fn is_always_allowed(self) -> bool {
        matches!(self, Blocking | Log)
    }

    /// True if a thread that holds such a lock may touch memory only: no file, socket, process or
    /// log line. The workspace lock is the exception, because an operation holds it across its
    /// guest I/O.
    #[cfg_attr(
        not(any(debug_assertions, feature = "lock-check")),
        allow(dead_code, reason = "only the lock checker calls it")
    )]
    pub const fn is_memory_only(self) -> bool {
        !self.is_virtual() && !matches!(self, Workspace) && !ONE_LOCK.contains(self)
    }

    pub const fn name(self) -> &'static str {
        match self {
            Job => "pool job",
            Vm => "vm_locks",
            Workspace => "workspace_locks",
            CreateVm => "create_vm",
            ImageOps => "image_ops",
            JobWait => "wait for a pool job",
            GuestIo => "guest I/O",
            VmmApi => "VMM API",
            HostCmd => "host command",
            DurableWait => "durable wait",
            Blocking => "blocking call",
            Log => "log call",
            Store => "store",
            Ops => "operation registry",
            Pool => "pool queue",
            Admission => "boot admission",
            Sessions => "session registry",
            Runtimes => "VM runtimes",
            Consoles => "consoles",
            Connections => "connections",
            Taps => "taps",
            CondWait => "condition wait",
        }
    }
}

// The order has no cycles because a rank may be taken only under ranks listed before it.
const _: () = {
    let mut i = 0;
    while i < Rank::ALL.len() {
        assert!(
            Rank::ALL[i] as usize == i,
            "Rank::ALL must list every rank in order"
        );
        assert!(
            Rank::ALL[i].under().0 >> i == 0,
            "a rank may be taken only under ranks listed before it"
        );
        i += 1;
    }
};

/// A place in the source.
#[cfg(any(debug_assertions, feature = "lock-check"))]
pub type Site = &'static Location<'static>;

/// `to` was taken while `from` was held.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Edge {
    pub from: Rank,
    pub to: Rank,
    /// The places where `from` and `to` were taken when the edge was first seen.
    pub first: (String, String),
}

/// A place where threads had to wait for a lock.
#[cfg(any(debug_assertions, feature = "lock-check"))]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Contention {
    pub rank: Rank,
    pub at: Site,
    pub count: u64,
}

/// Returns the rank with this name.
pub fn named(name: &str) -> Option<Rank> {
    Rank::ALL.into_iter().find(|rank| rank.name() == name)
}

/// Returns every pair (held, taken) that the table allows.
pub fn declared() -> impl Iterator<Item = (Rank, Rank)> {
    Rank::ALL
        .into_iter()
        .flat_map(|to| to.under().iter().map(move |from| (from, to)))
}

#[cfg_attr(
    not(any(debug_assertions, feature = "lock-check")),
    allow(dead_code, reason = "only the lock checker calls it")
)]
fn names(ranks: impl Iterator<Item = Rank>) -> String {
    let names: Vec<_> = ranks.map(Rank::name).collect();
    if names.is_empty() {
        "nothing".to_owned()
    } else {
        names.join(", ")
    }
}

/// Returns the rule for one rank, as violation reports and the table print it.
#[cfg_attr(
    not(any(debug_assertions, feature = "lock-check")),
    allow(dead_code, reason = "only the lock checker calls it")
)]
pub(super) fn rule(rank: Rank) -> String {
    names(rank.under().iter())
}

/// Returns the table for `ARCHITECTURE.md`. Consecutive ranks with the same rule share a line.
#[cfg(any(test, feature = "fakes"))]
pub fn markdown_table() -> String {
    let mut out = String::from("| taken | kind | while holding only |\n|---|---|---|\n");
    let alike = |a: &Rank, b: &Rank| a.under() == b.under() && a.is_virtual() == b.is_virtual();
    for group in Rank::ALL.chunk_by(alike) {
        let kind = if group[0].is_virtual() {
            "virtual"
        } else {
            "lock"
        };
        let _ = writeln!(
            out,
            "| {} | {kind} | {} |",
            names(group.iter().copied()),
            rule(group[0])
        );
    }
    out
}

/// One rule of the table, for people and scripts.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
pub struct Rule {
    pub taken: &'static str,
    #[serde(rename = "virtual")]
    pub is_virtual: bool,
    pub under: Vec<&'static str>,
}

/// Returns the rules of the table, outermost rank first.
pub fn order() -> Vec<Rule> {
    let rule = |r: Rank| Rule {
        taken: r.name(),
        is_virtual: r.is_virtual(),
        under: r.under().iter().map(Rank::name).collect(),
    };
    Rank::ALL.into_iter().map(rule).collect()
}

/// Returns the table as a Graphviz graph. If `observed` is given, edges that never occurred are
/// dotted, and the others are bold and say where both locks were taken when they first occurred.
pub fn dot(observed: Option<&[Edge]>) -> String {
    let mut out = String::from("digraph locks {\n");
    for rank in Rank::ALL {
        let shape = if rank.is_virtual() { "ellipse" } else { "box" };
        let _ = writeln!(
            out,
            "  {rank:?} [label=\"{}\", shape={shape}];",
            rank.name()
        );
    }
    for (from, to) in declared() {
        let seen = observed.map(|edges| edges.iter().find(|e| (e.from, e.to) == (from, to)));
        let _ = match seen {
            None => writeln!(out, "  {from:?} -> {to:?};"),
            Some(Some(Edge { first: (a, b), .. })) => {
                let sites = format!("{a} -> {b}");
                writeln!(
                    out,
                    "  {from:?} -> {to:?} [style=bold, tooltip=\"{sites}\"];"
                )
            }
            Some(None) => writeln!(out, "  {from:?} -> {to:?} [style=dotted];"),
        };
    }
    out + "}\n"
}
