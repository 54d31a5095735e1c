//! Draws a history from a seed: the requests of each caller, the fault and the schedule.

use fcd::testing::daemon::history::Verb;
use fcd::testing::sched::sim::{Policy, Random};
use std::time::Duration;

/// The callers of a history. The first is root, who creates nothing, so that every caller sees
/// every VM.
pub const CALLERS: usize = 4;
pub const VMS: u64 = 2;
pub const REQUESTS: usize = 24;
/// About how many effects and commits a history has.
const POINTS: u64 = 70;

#[derive(Clone, Debug, PartialEq)]
pub enum Ask {
    Create { keyed: bool },
    Start { hangs_up: bool },
    Stop { force: bool },
    Kill,
    Restart,
    Delete { force: bool },
    Set { vcpus: u32 },
    Rate(u64),
    Balloon(u64),
    Pause,
    Resume,
    Import(Payload),
    Export,
    Exec { holds: bool },
    Show,
    List,
    CancelOp,
    Snapshot,
    Restore,
    ForgetSnapshots,
    Fate(Fate),
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Payload {
    Whole,
    Cut,
    Stalled,
}

/// Something that a guest or its VMM does on its own.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fate {
    VmmDies,
    ShutsDown,
    LosesConnections,
    Hangs,
    Answers,
}

/// A request of one caller.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    pub caller: usize,
    pub vm: u64,
    pub ask: Ask,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum FaultKind {
    Fail,
    Slow(Duration),
    /// The daemon is killed after this many further points of the scheduler.
    Kill(u64),
}

/// A fault at the n-th effect or commit, counted from 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fault {
    pub at: u64,
    pub kind: FaultKind,
}

/// Names a history: a seed, and for a shorter history also the seed of its schedule, the requests
/// that are left and the point of the fault.
#[derive(Clone, Debug, PartialEq)]
pub struct Name {
    pub seed: u64,
    pub schedule: u64,
    /// One bit per request.
    pub kept: u64,
    pub fault_at: Option<u64>,
}

impl Name {
    pub fn whole(seed: u64) -> Self {
        Self {
            seed,
            schedule: seed,
            kept: u64::MAX,
            fault_at: None,
        }
    }

    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split(':');
        let seed = parts.next()?.parse().ok()?;
        let schedule = parts.next().map_or(Some(seed), |part| part.parse().ok())?;
        let kept = parts
            .next()
            .map_or(Some(u64::MAX), |part| u64::from_str_radix(part, 16).ok())?;
        let fault_at = match parts.next() {
            Some(part) => Some(part.parse().ok()?),
            None => None,
        };
        Some(Self {
            seed,
            schedule,
            kept,
            fault_at,
        })
    }
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if *self == Name::whole(self.seed) {
            return write!(f, "{}", self.seed);
        }
        write!(f, "{}:{}:{:x}", self.seed, self.schedule, self.kept)?;
        self.fault_at.map_or(Ok(()), |at| write!(f, ":{at}"))
    }
}

pub struct Plan {
    pub requests: Vec<Request>,
    pub fault: Fault,
    pub policy: Policy,
}

impl Plan {
    pub fn draw(name: &Name) -> Self {
        let mut random = Random::new(name.seed, 10);
        // The first two requests create the VMs, so that the others find them.
        let create = |caller, vm| Request {
            caller,
            vm,
            ask: Ask::Create { keyed: false },
        };
        let mut requests = vec![create(1, 0), create(2, 1)];
        requests.extend((2..REQUESTS).map(|_| request(&mut random)));
        let mut bit = 0;
        requests.retain(|_| {
            bit += 1;
            name.kept >> (bit - 1) & 1 == 1
        });
        let drawn = 1 + random.below(POINTS);
        let at = name.fault_at.unwrap_or(drawn);
        let kind = match random.below(10) {
            0..2 => FaultKind::Fail,
            2..4 => FaultKind::Slow(Duration::from_secs(1 + random.below(20))),
            _ if random.one_in(2) => FaultKind::Kill(0),
            _ => FaultKind::Kill(random.below(200)),
        };
        Self {
            requests,
            fault: Fault { at, kind },
            policy: Policy::draw(&mut Random::new(name.schedule, 11)),
        }
    }
}

fn request(random: &mut Random) -> Request {
    let caller = random.below(CALLERS as u64) as usize;
    let vm = random.below(VMS);
    let ask = match random.below(100) {
        0..8 => Ask::Create {
            keyed: random.one_in(4),
        },
        8..34 => Ask::Start {
            hangs_up: random.one_in(8),
        },
        34..42 => Ask::Stop {
            force: random.one_in(4),
        },
        42..46 => Ask::Kill,
        46..51 => Ask::Restart,
        51..58 => Ask::Delete {
            force: !random.one_in(3),
        },
        58..61 => Ask::Set {
            vcpus: 1 + random.below(2) as u32,
        },
        61..63 => Ask::Rate(128 + random.below(128)),
        63..65 => Ask::Balloon(128 + random.below(128)),
        65..67 => Ask::Pause,
        67..69 => Ask::Resume,
        69..75 => Ask::Import(match random.below(3) {
            0 => Payload::Whole,
            1 => Payload::Cut,
            _ => Payload::Stalled,
        }),
        75..77 => Ask::Export,
        77..81 => Ask::Exec {
            holds: random.one_in(2),
        },
        81..83 => Ask::Show,
        83..84 => Ask::List,
        84..87 => Ask::CancelOp,
        87..89 => Ask::Snapshot,
        89..91 => Ask::Restore,
        91..92 => Ask::ForgetSnapshots,
        _ => Ask::Fate(match random.below(5) {
            0 => Fate::VmmDies,
            1 => Fate::ShutsDown,
            2 => Fate::LosesConnections,
            3 => Fate::Hangs,
            _ => Fate::Answers,
        }),
    };
    // Root creates nothing, because other callers would not see its VM.
    let is_creation = matches!(ask, Ask::Create { .. } | Ask::Restore | Ask::Snapshot);
    let caller = if is_creation { caller.max(1) } else { caller };
    Request { caller, vm, ask }
}

impl Ask {
    /// Returns the verb whose answers the transition table decides.
    pub fn verb(&self) -> Option<Verb> {
        Some(match self {
            Ask::Start { .. } => Verb::Start,
            Ask::Stop { force: false } => Verb::Stop,
            Ask::Stop { force: true } => Verb::StopForce,
            Ask::Kill => Verb::Kill,
            Ask::Restart => Verb::Restart,
            Ask::Delete { force: false } => Verb::Delete,
            Ask::Delete { force: true } => Verb::DeleteForce,
            Ask::Set { .. } => Verb::Set,
            _ => return None,
        })
    }
}
