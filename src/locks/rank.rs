//! The lock order: which ranks may be held when another is taken. The only table.

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
    /// Virtual: about to talk to a guest.
    GuestIo,
    /// Virtual: about to talk to a VMM.
    VmmApi,
    /// Virtual: about to run a host command.
    HostCmd,
    /// Virtual: waits for a commit to be durable.
    DurableWait,
    Store,
    Ops,
    Pool,
    Admission,
    Sessions,
    /// The runtime records of VMs: cancel sets and boot tokens.
    Runtimes,
    Consoles,
    Connections,
    /// Virtual: inside a condition wait.
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
    pub const fn contains(self, rank: Rank) -> bool {
        self.0 & (1 << rank as u32) != 0
    }
    pub fn iter(self) -> impl Iterator<Item = Rank> {
        Rank::ALL.into_iter().filter(move |r| self.contains(*r))
    }
}

impl Rank {
    pub const ALL: [Rank; 19] = [
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
        Store,
        Ops,
        Pool,
        Admission,
        Sessions,
        Runtimes,
        Consoles,
        Connections,
        CondWait,
    ];

    /// The ranks that may be held when this one is taken; any other held rank is a violation.
    pub const fn under(self) -> RankSet {
        match self {
            Job | Vm | Workspace => RankSet::EMPTY,
            CreateVm | ImageOps => RankSet::of(&[Vm, Workspace]),
            JobWait => RankSet::of(&[Workspace]),
            GuestIo | VmmApi | HostCmd | DurableWait => RankSet::of(&[Job, Workspace]),
            Store | Ops | Pool | Admission | Sessions | Runtimes | Consoles | Connections => {
                RankSet::of(&[Job, Vm, Workspace, CreateVm, ImageOps, JobWait, GuestIo, VmmApi, HostCmd, DurableWait])
            }
            CondWait => RankSet::of(&[Job, Workspace, JobWait, DurableWait]),
        }
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
            Store => "store",
            Ops => "operation registry",
            Pool => "pool queue",
            Admission => "boot admission",
            Sessions => "session registry",
            Runtimes => "VM runtimes",
            Consoles => "consoles",
            Connections => "connections",
            CondWait => "condition wait",
        }
    }
}

// Acyclic by construction: a rank may be taken only under ranks listed before it.
const _: () = {
    let mut i = 0;
    while i < Rank::ALL.len() {
        assert!(Rank::ALL[i] as usize == i, "Rank::ALL must list every rank in order");
        assert!(Rank::ALL[i].under().0 >> i == 0, "a rank may be taken only under ranks listed before it");
        i += 1;
    }
};
