//! The transition table: what each verb does to a VM in each state. [`decide`] is a pure function,
//! and the rest of the daemon carries out its decisions.

use crate::api::vm::VmState;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    Start,
    Stop,
    /// Ends the guest without a grace period. Succeeds if the VM is at rest.
    StopForce,
    /// Ends the guest without a grace period. Is refused if the VM is at rest.
    Kill,
    Restart,
    /// A start that restores a snapshot.
    Restore,
    Delete,
    DeleteForce,
    Set,
    /// Anything that uses a running guest, such as exec, ssh, import, export, pause or snapshot.
    Guest,
}

impl Verb {
    #[cfg(any(test, feature = "fakes"))]
    pub const ALL: [Verb; 10] = [
        Verb::Start,
        Verb::Stop,
        Verb::StopForce,
        Verb::Kill,
        Verb::Restart,
        Verb::Restore,
        Verb::Delete,
        Verb::DeleteForce,
        Verb::Set,
        Verb::Guest,
    ];

    /// True if the verb ends the guest of a running VM.
    pub const fn ends_guest(self) -> bool {
        matches!(
            self,
            Verb::Stop | Verb::StopForce | Verb::Kill | Verb::Restart | Verb::DeleteForce
        )
    }

    pub const fn name(self) -> &'static str {
        match self {
            Verb::Start => "start",
            Verb::Stop => "stop",
            Verb::StopForce => "stop --force",
            Verb::Kill => "kill",
            Verb::Restart => "restart",
            Verb::Restore => "restore",
            Verb::Delete => "delete",
            Verb::DeleteForce => "delete --force",
            Verb::Set => "set",
            Verb::Guest => "use",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// The operation owns the VM from now on, in this transitional state.
    Claim(VmState),
    /// The VM is already in the wanted state. The call succeeds and nothing changes.
    Nothing,
    /// The call is allowed and does not change the state.
    Allow,
    /// The call gets the result of the operation in progress.
    Join,
    /// The call shortens the stop in progress and gets its result.
    Escalate,
    /// The call's operation takes the successor slot. A boot in progress is aborted, but a stop is
    /// finished. The successor begins in the critical section that ends the operation in progress.
    Queue,
    /// The call fails with `wrong_state` and this hint.
    Refuse(&'static str),
}

use Decision::{Allow, Claim, Escalate, Join, Nothing, Queue, Refuse};

const START_FIRST: &str = "start it first: fcctl start {vm}";
const FORCE: &str =
    "stop it first: fcctl stop {vm}, or delete it while it runs: fcctl rm --force {vm}";
const STOP_FIRST: &str = "stop it first: fcctl stop {vm}";
const NOT_RUNNING: &str = "it is not running: see fcctl vm show {vm}";
const BEING_DELETED: &str = "it is being deleted: create another one with fcctl vm create";
const WAIT_STOPPED: &str = "wait until it has stopped: fcctl vm wait {vm}, then fcctl start {vm}";
const WAIT_RUNNING: &str =
    "wait until it is running: fcctl vm wait --state running {vm}, then try again";

/// Decides what `verb` does to a VM in `state`. `restarting` is true for a `stopping` VM that
/// starts again once it has stopped.
pub const fn decide(state: VmState, restarting: bool, verb: Verb) -> Decision {
    use VmState::{Created, Deleting, Failed, Running, Starting, Stopped, Stopping};
    match (state, verb) {
        (Created | Stopped | Failed, Verb::Start | Verb::Restart | Verb::Restore) => {
            Claim(Starting)
        }
        (Created | Stopped | Failed, Verb::Stop | Verb::StopForce) => Nothing,
        (Created | Stopped | Failed, Verb::Kill) => Refuse(NOT_RUNNING),
        (Created | Stopped | Failed, Verb::Delete | Verb::DeleteForce) => Claim(Deleting),
        (Created | Stopped | Failed, Verb::Guest) => Refuse(START_FIRST),

        (Starting, Verb::Start) => Join,
        (
            Starting,
            Verb::Stop | Verb::StopForce | Verb::Kill | Verb::Delete | Verb::DeleteForce,
        ) => Queue,
        (Starting | Running | Stopping, Verb::Restore) => Refuse(STOP_FIRST),
        (Starting, Verb::Restart | Verb::Guest) => Refuse(WAIT_RUNNING),

        (Running, Verb::Start) => Nothing,
        (Running, Verb::Stop | Verb::StopForce | Verb::Kill | Verb::Restart) => Claim(Stopping),
        (Running, Verb::Delete) => Refuse(FORCE),
        (Running, Verb::DeleteForce) => Claim(Deleting),
        (Running, Verb::Guest) => Allow,

        (Stopping, Verb::Start) if restarting => Join,
        (Stopping, Verb::Start) => Refuse(WAIT_STOPPED),
        (Stopping, Verb::Restart) if restarting => Join,
        (Stopping, Verb::Restart | Verb::Guest) => Refuse(WAIT_STOPPED),
        // A stop during a restart cancels the start that would follow.
        (Stopping, Verb::Stop | Verb::StopForce | Verb::Kill) if restarting => Queue,
        (Stopping, Verb::Stop) => Join,
        (Stopping, Verb::StopForce | Verb::Kill) => Escalate,
        (Stopping, Verb::Delete | Verb::DeleteForce) => Queue,

        (Deleting, Verb::Delete | Verb::DeleteForce) => Join,
        (Deleting, _) => Refuse(BEING_DELETED),

        (_, Verb::Set) => Allow,
    }
}

/// Renders the table for `ARCHITECTURE.md`.
#[cfg(any(test, feature = "fakes"))]
pub fn markdown_table() -> String {
    let mut out = String::from("| state |");
    for verb in Verb::ALL {
        out += &format!(" {} |", verb.name());
    }
    out += "\n|---|";
    out += &"---|".repeat(Verb::ALL.len());
    let rows = VmState::ALL.iter().flat_map(|s| {
        let second = (*s == VmState::Stopping).then_some((*s, true));
        [Some((*s, false)), second].into_iter().flatten()
    });
    for (state, restarting) in rows {
        let label = if restarting {
            "stopping (restart)"
        } else {
            state.name()
        };
        out += &format!("\n| {label} |");
        for verb in Verb::ALL {
            let cell = match decide(state, restarting, verb) {
                Claim(to) => format!("-> {}", to.name()),
                Nothing => "ok, nothing".to_owned(),
                Allow => "allowed".to_owned(),
                Join => "join".to_owned(),
                Escalate => "shorten, join".to_owned(),
                Queue => "queue".to_owned(),
                Refuse(_) => "refused".to_owned(),
            };
            out += &format!(" {cell} |");
        }
    }
    out + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::expect;

    /// The expected table lists every pair, so that a change of a decision is visible in review.
    #[test]
    fn every_state_and_verb_has_its_decision() {
        expect![[r#"
            | state | start | stop | stop --force | kill | restart | restore | delete | delete --force | set | use |
            |---|---|---|---|---|---|---|---|---|---|---|
            | created | -> starting | ok, nothing | ok, nothing | refused | -> starting | -> starting | -> deleting | -> deleting | allowed | refused |
            | starting | join | queue | queue | queue | refused | refused | queue | queue | allowed | refused |
            | running | ok, nothing | -> stopping | -> stopping | -> stopping | -> stopping | refused | refused | -> deleting | allowed | allowed |
            | stopping | refused | join | shorten, join | shorten, join | refused | refused | queue | queue | allowed | refused |
            | stopping (restart) | join | queue | queue | queue | join | refused | queue | queue | allowed | refused |
            | stopped | -> starting | ok, nothing | ok, nothing | refused | -> starting | -> starting | -> deleting | -> deleting | allowed | refused |
            | deleting | refused | refused | refused | refused | refused | refused | join | join | refused | refused |
            | failed | -> starting | ok, nothing | ok, nothing | refused | -> starting | -> starting | -> deleting | -> deleting | allowed | refused |
        "#]]
        .assert_eq(&markdown_table());
    }

    #[test]
    fn claim_enters_transitional_state_from_settled_one() {
        for state in VmState::ALL {
            for verb in Verb::ALL {
                if let Claim(to) = decide(state, false, verb) {
                    assert!(matches!(
                        to,
                        VmState::Starting | VmState::Stopping | VmState::Deleting
                    ));
                    assert!(!matches!(
                        state,
                        VmState::Starting | VmState::Stopping | VmState::Deleting
                    ));
                }
            }
        }
    }

    #[test]
    fn refusal_has_a_hint() {
        for state in VmState::ALL {
            for verb in Verb::ALL {
                for restarting in [false, true] {
                    if let Refuse(hint) = decide(state, restarting, verb) {
                        assert!(!hint.is_empty());
                    }
                }
            }
        }
    }
}
