use super::*;
use std::sync::Arc;
use std::sync::mpsc::channel;

const TAG: &str = "fc-test-0123456789ab-1";

struct Fixture {
    fake: Arc<Fake>,
    spec: VmmSpec,
    cancel: Cancel,
    _dir: tempfile::TempDir,
}

fn fixture() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let spec = spec(TAG.parse().unwrap(), dir.path());
    std::fs::create_dir(&spec.dir).unwrap();
    Fixture {
        fake: Arc::new(Fake::new().unwrap()),
        spec,
        cancel: Cancel::try_new().unwrap(),
        _dir: dir,
    }
}

impl Fixture {
    fn start(&self) -> Result<Running> {
        self.fake.start(&self.spec, &self.cancel, &mut |_| {})
    }
    fn start_aside(&self) -> crate::sched::JoinHandle<Result<Running>> {
        let (fake, spec, cancel) = (self.fake.clone(), self.spec.clone(), self.cancel.clone());
        crate::host::thread::spawn("start", move || fake.start(&spec, &cancel, &mut |_| {}))
            .unwrap()
    }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

#[test]
fn start_watch_die_and_restart() {
    let f = fixture();
    let running = f.start().unwrap();
    let id = &running.identity;
    assert!(f.fake.is_alive(id));
    assert_eq!(f.fake.find(TAG).unwrap().as_ref(), Some(id));
    assert_eq!(f.fake.live(), [TAG]);
    assert!(!f.fake.wait_exit(id, Instant::now(), &f.cancel).unwrap());
    assert_eq!(f.start().unwrap_err().kind(), Kind::VmmFailed);
    assert_eq!(f.fake.clashes(), 1);
    let (sender, ends) = channel();
    let again = sender.clone();
    f.fake
        .watch(
            &f.spec.dir,
            id,
            Box::new(move |how| sender.send(how).unwrap()),
        )
        .unwrap();
    assert!(f.fake.die(&f.spec.vm, &End::GuestReset));
    assert!(!f.fake.die(&f.spec.vm, &End::GuestReset));
    f.fake
        .watch(
            &f.spec.dir,
            id,
            Box::new(move |how| again.send(how).unwrap()),
        )
        .unwrap();
    for _ in 0..2 {
        assert_eq!(
            ends.recv_timeout(Duration::from_secs(10)).unwrap(),
            End::GuestReset
        );
    }
    assert!(f.fake.wait_exit(id, soon(), &f.cancel).unwrap());
    assert!(!f.fake.is_alive(id) && f.fake.live().is_empty());
    assert_eq!(f.fake.find(TAG).unwrap(), None);
    f.start().unwrap();
}

#[test]
fn held_start_continues_or_is_cancelled_cleanly() {
    for stage in [Stage::BeforeSpawn, Stage::AfterSpawn] {
        let f = fixture();
        f.fake.hold_starts(stage);
        let start = f.start_aside();
        assert!(f.fake.await_held(1, soon()));
        assert_eq!(f.fake.live().len(), usize::from(stage == Stage::AfterSpawn));
        f.fake.release_starts();
        let running = start.join().unwrap().unwrap();
        f.fake.kill(&running.identity, soon()).unwrap();
        f.fake.hold_starts(stage);
        let start = f.start_aside();
        assert!(f.fake.await_held(1, soon()));
        f.cancel.cancel(crate::locks::CancelCause::VmStopped);
        assert_eq!(start.join().unwrap().unwrap_err().kind(), Kind::Cancelled);
        assert!(f.fake.live().is_empty());
    }
}

#[test]
fn failed_start_leaves_nothing() {
    let f = fixture();
    f.fake.fail_next_start("no such disk");
    assert_eq!(
        f.start().unwrap_err().to_string(),
        "start the VMM: no such disk"
    );
    assert!(f.fake.live().is_empty());
    f.start().unwrap();
    assert_eq!(f.fake.starts(), 2);
}

#[test]
fn kill_of_unkillable_vmm_times_out() {
    let f = fixture();
    let id = f.start().unwrap().identity;
    f.fake.set_unkillable(true);
    let e = f
        .fake
        .kill(&id, Instant::now() + Duration::from_millis(5))
        .unwrap_err();
    assert_eq!(e.kind(), Kind::Timeout);
    assert!(f.fake.is_alive(&id));
    f.fake.set_unkillable(false);
    f.fake.kill(&id, soon()).unwrap();
    f.fake.kill(&id, soon()).unwrap();
    assert_eq!(f.fake.kills(), 2);
}

#[test]
fn adopted_vmm_gets_its_console_back() {
    let f = fixture();
    let id = f.start().unwrap().identity;
    let mut follower = f.fake.consoles().follow(&f.spec.dir, None).unwrap();
    let mut until = |end: &str| {
        let mut seen = String::new();
        while !seen.ends_with(end) {
            match follower.next_chunk().unwrap() {
                Some(text) => seen += &text,
                None => assert_eq!(
                    follower.wait(soon(), &f.cancel).unwrap(),
                    super::super::console::FollowerState::More
                ),
            }
        }
        seen
    };
    f.fake.guest_says(&f.spec.vm, "one\n");
    assert_eq!(
        until("one\n"),
        format!("--- fcd: started {TAG} ---\r\none\n")
    );
    f.fake.forget_watchers();
    assert_eq!(f.fake.adopt(&f.spec, &id).unwrap().identity, id);
    f.fake.guest_says(&f.spec.vm, "two\n");
    assert!(until("two\n").contains("reconnected"));
    let other = VmmSpec {
        tag: Tag::new("test", &f.spec.vm, 2),
        ..f.spec.clone()
    };
    assert_eq!(
        f.fake.adopt(&other, &id).unwrap_err().kind(),
        Kind::VmmFailed
    );
}
