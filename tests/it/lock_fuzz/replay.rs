//! Replays each VM's history through the transition table, and looks for an explanation of each
//! reply.

use super::actor::{Reply, Seen};
use fcd::testing::api::vm::VmState;
use fcd::testing::daemon::history::{Answer, CommitKind, Event, Verb, What};
use fcd::testing::daemon::{Decision, decide};
use fcd::testing::ids::{OpId, VmId};
use std::collections::BTreeMap;

pub struct Told {
    pub explained: u64,
    pub claims: u64,
    pub commits: u64,
}

/// A VM's state according to its history.
#[derive(Clone, Debug)]
struct Model {
    state: Option<VmState>,
    restarting: bool,
    op: Option<OpId>,
    successor: Option<(Verb, OpId)>,
    has_run: bool,
}

impl Default for Model {
    /// Returns the model of a VM that has just been created. Another call can find a new VM by name
    /// before the history contains its creation, because no VM lock is held while that entry is
    /// written.
    fn default() -> Self {
        Self {
            state: Some(VmState::Created),
            restarting: false,
            op: None,
            successor: None,
            has_run: false,
        }
    }
}

fn deletes(verb: Verb) -> bool {
    matches!(verb, Verb::Delete | Verb::DeleteForce)
}

/// Returns the weight of a call as a successor. A delete replaces a stop, and force replaces a
/// graceful stop.
fn weight(verb: Verb) -> u8 {
    match verb {
        _ if deletes(verb) => 2,
        Verb::StopForce | Verb::Kill => 1,
        _ => 0,
    }
}

impl Model {
    fn apply(&mut self, what: &What) -> Result<(), String> {
        match what {
            What::Created => Ok(()),
            What::Asked {
                verb,
                state,
                restarting,
                answer,
                op,
            } => {
                if self.state != Some(*state) || self.restarting != *restarting {
                    return Err("the row said otherwise".to_owned());
                }
                let (expected, with) = self.answer(*verb, *state, op.as_ref());
                // A quota may refuse a call that the table allows.
                let limited = *answer == Answer::Failed && !matches!(expected, Answer::Refused);
                if *answer != expected && !limited {
                    return Err(format!("the table gives {expected:?}"));
                }
                if !limited && with.as_ref() != op.as_ref() {
                    return Err(format!("it is about operation {with:?}"));
                }
                if !limited {
                    self.take(*verb, *state, op.as_ref());
                }
                Ok(())
            }
            What::Committed {
                op,
                ending,
                state,
                next,
            } => self.commit(op, *ending, *state, next.as_ref()),
            What::Died { state } if self.state == Some(VmState::Running) => {
                self.state = Some(*state);
                Ok(())
            }
            What::Died { .. } => Err("its VMM died and it did not run".to_owned()),
        }
    }

    /// Returns the table's answer and the operation that the answer refers to.
    fn answer(&self, verb: Verb, state: VmState, new: Option<&OpId>) -> (Answer, Option<OpId>) {
        match decide(state, self.restarting, verb) {
            Decision::Claim(_) => (Answer::Claimed, new.cloned()),
            Decision::Nothing | Decision::Allow => (Answer::Nothing, None),
            Decision::Refuse(_) => (Answer::Refused, None),
            Decision::Join | Decision::Escalate
                if verb == Verb::Start && self.successor.is_some() =>
            {
                (Answer::Refused, None)
            }
            Decision::Join | Decision::Escalate => (Answer::Joined, self.op.clone()),
            Decision::Queue => match &self.successor {
                Some((next, op)) if weight(*next) >= weight(verb) => {
                    if deletes(*next) && !deletes(verb) {
                        (Answer::Refused, None)
                    } else {
                        (Answer::Joined, Some(op.clone()))
                    }
                }
                _ => (Answer::Queued, new.cloned()),
            },
        }
    }

    fn take(&mut self, verb: Verb, state: VmState, op: Option<&OpId>) {
        match (
            self.answer(verb, state, op).0,
            decide(state, self.restarting, verb),
        ) {
            (Answer::Claimed, Decision::Claim(to)) => {
                self.state = Some(to);
                self.op = op.cloned();
                self.restarting = verb == Verb::Restart && to == VmState::Stopping;
            }
            (Answer::Queued, _) => self.successor = op.map(|op| (verb, op.clone())),
            _ => {}
        }
    }

    fn commit(
        &mut self,
        op: &OpId,
        ending: CommitKind,
        state: Option<VmState>,
        next: Option<&OpId>,
    ) -> Result<(), String> {
        if self.op.as_ref() != Some(op) {
            return Err(format!("{:?} owned it", self.op));
        }
        self.has_run |= ending == CommitKind::Booted;
        let rest = match ending {
            CommitKind::Booted => Some(VmState::Running),
            CommitKind::BootCancelled if self.has_run => Some(VmState::Stopped),
            CommitKind::BootCancelled => Some(VmState::Created),
            CommitKind::Ended => Some(VmState::Stopped),
            CommitKind::BootDied | CommitKind::BootFailed | CommitKind::StillThere => {
                Some(VmState::Failed)
            }
            CommitKind::Deleted => None,
        };
        let successor = self.successor.take().filter(|_| rest.is_some());
        let (expected, by) = match &successor {
            Some((verb, by)) if deletes(*verb) => (Some(VmState::Deleting), Some(by)),
            Some((_, by)) => (Some(VmState::Stopping), Some(by)),
            // If there is no room for the VM's memory, a restart ends after the stop.
            None if self.restarting && ending == CommitKind::Ended && next.is_some() => {
                (Some(VmState::Starting), Some(op))
            }
            // The daemon deletes a settled VM that is marked for deletion.
            None if rest != Some(VmState::Running) && state == Some(VmState::Deleting) => {
                (Some(VmState::Deleting), next)
            }
            None => (rest, None),
        };
        if state != expected || next != by {
            return Err(format!("expected {expected:?} with {by:?}"));
        }
        (self.state, self.op, self.restarting) = (state, next.cloned(), false);
        Ok(())
    }
}

pub fn check(events: &[Event], seen: &[Seen]) -> Result<Told, String> {
    let mut vms: BTreeMap<&VmId, (Model, u64, Vec<&Event>)> = BTreeMap::new();
    for event in events {
        let (model, seq, past) = vms.entry(&event.vm).or_default();
        past.push(event);
        let history = || {
            past.iter()
                .map(|e| format!("  {:?} {:?}\n", e.seq, e.what))
                .collect::<String>()
        };
        if matches!(event.what, What::Created) {
            continue;
        }
        if event.seq < *seq {
            return Err(format!(
                "change {} comes after {seq}:\n{}",
                event.seq,
                history()
            ));
        }
        *seq = event.seq;
        let before = model.clone();
        model
            .apply(&event.what)
            .map_err(|e| format!("{e}; it was {before:?}:\n{}", history()))?;
    }
    explain(events, seen)?;
    let count = |f: fn(&What) -> bool| events.iter().filter(|e| f(&e.what)).count() as u64;
    Ok(Told {
        explained: seen.len() as u64,
        claims: count(|w| {
            matches!(
                w,
                What::Asked {
                    answer: Answer::Claimed,
                    ..
                }
            )
        }),
        commits: count(|w| matches!(w, What::Committed { .. })),
    })
}

/// Finds, for each reply, a history entry that explains the reply and was made between the call and
/// the reply. Each entry explains at most one reply. Returns an error if there is no such entry.
fn explain(events: &[Event], seen: &[Seen]) -> Result<(), String> {
    let mut used = vec![false; events.len()];
    let mut by_end: Vec<&Seen> = seen.iter().collect();
    // Replies are matched in order of arrival, and each takes the first entry that fits. An entry
    // that a later reply needs is never used up in this order.
    by_end.sort_by_key(|s| s.received);
    for call in by_end {
        if call.reply == Reply::NotFound {
            was_absent(events, call)?;
            continue;
        }
        let fits = |e: &Event| {
            e.name.as_str() == call.name
                && e.between.1 >= call.sent
                && e.between.1 <= call.received
                && gives(e, call)
        };
        let Some(i) = (0..events.len()).find(|i| !used[*i] && fits(&events[*i])) else {
            let near: String = events
                .iter()
                .filter(|e| {
                    e.name.as_str() == call.name
                        && e.between.1 >= call.sent
                        && e.between.1 <= call.received
                })
                .map(|e| format!("  {:?}\n", e.what))
                .collect();
            return Err(format!(
                "nothing in the history explains {call:?}; meanwhile:\n{near}"
            ));
        };
        used[i] = true;
    }
    Ok(())
}

fn gives(event: &Event, call: &Seen) -> bool {
    let What::Asked {
        verb,
        state,
        answer,
        op,
        ..
    } = &event.what
    else {
        return false;
    };
    if *verb != call.verb || *op != call.op {
        return false;
    }
    match (answer, &call.reply) {
        (Answer::Refused, Reply::Refused(message)) => {
            message.ends_with(&format!("it is {}", state.name()))
        }
        (Answer::Refused, _) | (_, Reply::Refused(_)) => false,
        (Answer::Nothing, reply) => *reply == Reply::Ok,
        (Answer::Failed, reply) => *reply != Reply::Ok,
        // The actor has already compared the operation's result with the reply.
        (Answer::Claimed | Answer::Joined | Answer::Queued, _) => true,
    }
}

/// Returns an error unless no VM with that name existed at some moment of the call.
fn was_absent(events: &[Event], call: &Seen) -> Result<(), String> {
    let of_name = || events.iter().filter(|e| e.name.as_str() == call.name);
    for made in of_name().filter(|e| matches!(e.what, What::Created) && e.between.1 <= call.sent) {
        let gone = of_name().find(|e| {
            e.vm == made.vm
                && matches!(
                    e.what,
                    What::Committed {
                        ending: CommitKind::Deleted,
                        ..
                    }
                )
        });
        if gone.is_none_or(|gone| call.received <= gone.between.0) {
            return Err(format!("{} was there all the time: {call:?}", made.vm));
        }
    }
    Ok(())
}
