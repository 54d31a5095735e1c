//! A test with many watchers that join and lag while many changes happen.

use super::{Ours, read_line};
use crate::world::*;
use fcd::testing::api::event::*;
use fcd::testing::api::frame::{Line, Note};
use fcd::testing::api::vm::*;
use fcd::testing::daemon::Caller;
use fcd::testing::error::Kind;
use std::io::BufReader;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

/// A watcher that runs as `uid` and reads one line per permit. When the permits' sender is gone, it
/// reads without limit.
struct Tail {
    daemon: fcd::testing::daemon::Daemon,
    uid: u32,
    since: Option<u64>,
    permits: Receiver<()>,
}

/// The changes that a watcher received after its first snapshot, each as a sequence number and a
/// memory size.
#[derive(Debug, PartialEq)]
struct Tailed {
    after: u64,
    changes: Vec<(u64, u64)>,
    lags: usize,
}

impl Tail {
    /// Watches until the last of the changes `last` that this uid may see arrives. After every lag,
    /// watches again.
    fn until(self, last: &[(u32, u64)]) -> Tailed {
        let is_seen = |owner: u32| self.uid == 0 || self.uid == owner;
        let last = last
            .iter()
            .filter(|(owner, _)| is_seen(*owner))
            .map(|(_, mem)| *mem)
            .max()
            .unwrap();
        let mut tailed = Tailed {
            after: self.since.unwrap_or_default(),
            changes: vec![],
            lags: 0,
        };
        let (mut since, mut is_over) = (self.since, false);
        loop {
            let (peer, ours) = UnixStream::pair().unwrap();
            peer.set_read_timeout(Some(SOON)).unwrap();
            let (daemon, caller) = (
                self.daemon.clone(),
                Caller {
                    uid: self.uid,
                    gid: self.uid,
                    pid: 0,
                },
            );
            let watch = fcd::testing::host::thread::spawn("watch", move || {
                let ours = Ours(Arc::new(ours));
                daemon
                    .watchers
                    .watch_events(&caller, &EventsWatchRequest { since }, &ours)
            });
            let mut lines = BufReader::new(peer.try_clone().unwrap());
            since = loop {
                self.permit();
                match read_line(&mut lines).expect("the daemon has hung up") {
                    Line::Note(Note::Events(told)) => tailed.take(&told),
                    Line::Note(Note::Snapshot(snapshot)) => {
                        assert!(!snapshot.resync);
                        tailed.after = snapshot.seq;
                        is_over = snapshot.vms.iter().any(|vm| vm.mem_mib == last);
                    }
                    Line::Note(Note::Lagged(lagged)) => break Some(lagged.resume_seq),
                    other => panic!("{other:?}"),
                }
                if is_over || tailed.changes.last().is_some_and(|(_, mem)| *mem == last) {
                    peer.shutdown(std::net::Shutdown::Both).unwrap();
                    assert_eq!(
                        watch.unwrap().join().unwrap().unwrap_err().kind(),
                        Kind::Cancelled
                    );
                    return tailed;
                }
            };
            tailed.lags += 1;
            assert_eq!(
                watch.unwrap().join().unwrap().unwrap().resume_seq,
                since.unwrap()
            );
        }
    }

    fn permit(&self) {
        let _ = self.permits.recv();
    }
}

impl Tailed {
    #[track_caller]
    fn take(&mut self, told: &Events) {
        let [event] = told.events.as_slice() else {
            panic!("{told:?}")
        };
        let What::Changed { set } = &event.what else {
            panic!("{event:?}")
        };
        self.changes
            .push((told.seq, set["mem_mib"].as_u64().unwrap()));
    }
}

#[test]
fn lagging_watchers_under_load_match_store() {
    // This is fewer than the store keeps, so no watcher needs a second snapshot.
    const CHANGES: u64 = 3600;
    const JOIN_EVERY: u64 = 900;
    let world = World::new();
    let vms = [1000, 2000].map(|uid| {
        let request = VmCreateRequest {
            name: Some(format!("of-{uid}").parse().unwrap()),
            ..Default::default()
        };
        (
            uid,
            world
                .daemon()
                .creator
                .create(
                    &Caller {
                        uid,
                        gid: uid,
                        pid: 0,
                    },
                    &request,
                )
                .unwrap()
                .id,
        )
    });
    let last = vms.each_ref().map(|(uid, _)| {
        (
            *uid,
            if *uid == 1000 {
                10_000 + CHANGES
            } else {
                9_999 + CHANGES
            },
        )
    });
    let (mut truth, mut tails, mut stutterers, mut sleepers) = (vec![], vec![], vec![], vec![]);
    for n in 1..=CHANGES {
        if n % JOIN_EVERY == 1 {
            let now = world
                .daemon()
                .core
                .store
                .barrier()
                .unwrap()
                .wait(soon())
                .unwrap();
            for (uid, since) in [
                (0, None),
                (1000, None),
                (2000, None),
                (0, Some(now)),
                (2000, Some(now)),
            ] {
                for kind in 0..3 {
                    let (permit, permits) = channel();
                    match kind {
                        0 => drop(permit),
                        1 => stutterers.push(permit),
                        _ => sleepers.push(permit),
                    }
                    let tail = Tail {
                        daemon: world.daemon().clone(),
                        uid,
                        since,
                        permits,
                    };
                    let body = move || (uid, tail.until(&last));
                    tails.push(fcd::testing::host::thread::spawn("tail", body).unwrap());
                }
            }
        }
        let (owner, id) = &vms[usize::from(n % 2 == 1)];
        let mem = 10_000 + n;
        let ((), ticket) = world
            .daemon()
            .core
            .store
            .change(|tx| tx.update_vm_unlocked(id, |r| r.shape.mem_mib = mem))
            .unwrap();
        truth.push((*owner, ticket.seq(), mem));
        if n % 50 == 0 {
            ticket.wait(soon()).unwrap();
            // The stuttering watchers read a few lines at a time.
            for permit in &stutterers {
                (0..n % 150 / 50 * 40).for_each(|_| permit.send(()).unwrap_or_default());
            }
        }
    }
    drop((stutterers, sleepers));
    let mut lags = 0;
    for tail in tails {
        let (uid, tailed) = tail.join().unwrap();
        let theirs = truth
            .iter()
            .filter(|(owner, seq, _)| (uid == 0 || *owner == uid) && *seq > tailed.after);
        assert_eq!(
            tailed.changes,
            theirs.map(|(_, seq, mem)| (*seq, *mem)).collect::<Vec<_>>(),
            "the changes for uid {uid} differ"
        );
        lags += tailed.lags;
    }
    assert!(lags > 0, "no watcher was slow enough to lag");
}
