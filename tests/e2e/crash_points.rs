//! Kills the daemon at points of its operations on real guests with a bridge, ports and work disks.
//! The module `crash` of the `it` tests covers all points with fake guests and defines the
//! invariants I1 to I7.

use crate::bridge::{enter_a_host_with_an_outside, on_the_bridge, published};
use crate::host::{Host, wait_for};

/// The highest number of points to try. Every operation has fewer.
const POINTS_MAX: u64 = 100;
/// The distance between two tested points. `--long` tests every point.
const STEP: u64 = 6;

/// fcctl's exit status if the daemon hangs up.
const UNREACHABLE: i32 = 5;

#[derive(Default, Debug)]
struct Figures {
    points: u64,
    /// The number of guests that kept running.
    survived: u64,
}

struct Trial<'a> {
    host: &'a mut Host,
    operation: &'a Operation,
}

struct Operation {
    args: &'static [&'static str],
    before: &'static str,
    after: &'static str,
    /// The additional state that the VM may have after the operation is interrupted.
    between: &'static str,
}

const OPERATIONS: [Operation; 6] = [
    Operation {
        args: &["start"],
        before: "stopped",
        after: "running",
        between: "stopped",
    },
    Operation {
        args: &["stop"],
        before: "running",
        after: "stopped",
        between: "running",
    },
    Operation {
        args: &["vm", "restart"],
        before: "running",
        after: "running",
        between: "stopped",
    },
    Operation {
        args: &["vm", "set", "--vcpus", "1"],
        before: "running",
        after: "running",
        between: "running",
    },
    Operation {
        args: &["snapshot", "create"],
        before: "running",
        after: "running",
        between: "running",
    },
    Operation {
        args: &["rm", "-f"],
        before: "running",
        after: "gone",
        between: "running",
    },
];

impl Trial<'_> {
    fn state(&self) -> String {
        wait_for("the VM is in no transition", || {
            let all = self.host.json(&["ps", "-a"]);
            let Some(vm) = all.as_array().unwrap().first() else {
                return Some("gone".to_owned());
            };
            let state = vm["state"].as_str().unwrap();
            let rests =
                vm["op"].is_null() && !["starting", "stopping", "deleting"].contains(&state);
            rests.then(|| state.to_owned())
        })
    }

    /// Creates the VM, with a mark on its disks, if it does not exist. Brings it into the
    /// operation's initial state.
    fn set_the_scene(&self) {
        if self.state() == "gone" {
            self.host.ok(&[
                "vm",
                "create",
                "--name",
                "web",
                "-p",
                "1022:22",
                "--work-disk",
                "64M",
            ]);
            self.host.ok(&["start", "web"]);
            self.host
                .sh("web", "echo kept | tee /root/mark /work/mark; sync");
        }
        let verb = if self.operation.before == "running" {
            "start"
        } else {
            "stop"
        };
        self.host.ok(&[verb, "web"]);
    }

    /// Runs the operation once, kills the daemon at point `n`, and checks the invariants. Returns
    /// false if the operation has fewer points.
    fn at_point(&mut self, n: u64, figures: &mut Figures) -> bool {
        self.set_the_scene();
        let pid = self.host.show("web", "pid");
        self.host.arm(n);
        let Operation {
            args,
            before,
            after,
            between,
        } = *self.operation;
        let args = [args, &["web"]].concat();
        let ended = self.host.fcctl(&args);
        if !self.host.disarm(ended.status.code() == Some(UNREACHABLE)) {
            assert!(ended.status.success(), "{args:?}: {ended:?}");
            return false;
        }
        figures.points += 1;
        self.host.relaunch();
        let at = format!("{args:?}, killed at point {n}");
        let state = self.state();
        // I5: acknowledged operations have happened.
        let may_be = if ended.status.success() {
            vec![after]
        } else {
            vec![before, after, between]
        };
        assert!(
            may_be.contains(&state.as_str()),
            "{at}: {ended:?}, and it is {state}"
        );
        // I1 and I2: the host agrees with the row, and nothing is left over.
        let on_host = if state == "running" {
            ((1, 1), 1)
        } else {
            ((0, 0), 0)
        };
        wait_for("rules and taps agree", || {
            ((on_the_bridge(), published()) == on_host).then_some(())
        });
        let leaks = self.host.json(&["doctor", "--leaks"]);
        assert_eq!(leaks.as_array().map(Vec::len), Some(0), "{at}: {leaks}");
        if self.operation.before == "running"
            && state == "running"
            && self.host.show("web", "pid") == pid
        {
            figures.survived += 1;
        }
        for snapshot in self.host.json(&["snapshot", "list"]).as_array().unwrap() {
            self.host
                .ok(&["snapshot", "delete", snapshot["id"].as_str().unwrap()]);
        }
        if state != "gone" {
            // I6: the next operation works and uses the same disks.
            self.host.ok(&["start", "web"]);
            assert_eq!(
                self.host.sh("web", "cat /root/mark /work/mark"),
                "kept\nkept\n",
                "{at}"
            );
        }
        true
    }
}

fn go_through(step: u64) {
    enter_a_host_with_an_outside();
    let mut host = Host::with_config("[network]\ndriver = \"bridge\"\n");
    let mut figures = Figures::default();
    for operation in &OPERATIONS {
        let mut trial = Trial {
            host: &mut host,
            operation,
        };
        // The loop starts with the first point, because a guest always survives the first point of
        // `vm set`.
        let mut points = (1..POINTS_MAX).step_by(usize::try_from(step).unwrap());
        assert!(
            points.any(|n| !trial.at_point(n, &mut figures)),
            "{:?} has more than {POINTS_MAX} points",
            operation.args
        );
    }
    assert!(
        figures.survived > 0,
        "no guest outlived its daemon: {figures:?}"
    );
    println!("real guests: {figures:?}, leftovers: 0");
    host.fcctl(&["rm", "-f", "web"]);
    assert_eq!((on_the_bridge(), published()), ((0, 0), 0));
}

#[test]
fn crash_at_some_points_recovers() {
    go_through(STEP);
}

#[test]
#[ignore = "minutes: scripts/test --long"]
fn crash_at_every_point_recovers() {
    go_through(1);
}
