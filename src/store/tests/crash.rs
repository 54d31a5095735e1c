use super::*;
use crate::host::{Command, command::run_any_status};
use crate::locks::{Cancel, CancelCause};

const DIR: &str = "FCD_TEST_STORE_DIR";

/// The writer process that the test below kills. It prints each number after the store has
/// acknowledged it.
#[test]
#[ignore = "run by killed_daemon_keeps_acknowledged_changes"]
fn child_that_writes_until_it_is_killed() {
    let Ok(dir) = std::env::var(DIR) else { return };
    let store = Store::open(Path::new(&dir)).unwrap();
    let from = store.read(|s| s.vms().count()) as u32;
    for n in from.. {
        put(&store, n).unwrap().wait(soon()).unwrap();
        println!("\nacknowledged {n}");
    }
}

#[test]
fn killed_daemon_keeps_acknowledged_changes() {
    let dir = dir();
    let mut acknowledged = None;
    for round in 1..=3 {
        let child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "store::tests::crash::child_that_writes_until_it_is_killed",
                "--ignored",
                "--nocapture",
            ])
            .env(DIR, dir.path());
        let cancel = Cancel::try_new().unwrap();
        let mut seen = 0;
        let e = run_any_status(&child, &cancel, &mut |line| {
            if let Some(n) = line.strip_prefix("acknowledged ") {
                acknowledged = Some(n.parse::<u32>().unwrap());
                seen += 1;
                if seen == 20 * round {
                    cancel.cancel(CancelCause::Requested);
                }
            }
        })
        .unwrap_err();
        assert_eq!(e.kind(), Kind::Cancelled, "{e}");
        let store = Store::open(dir.path()).unwrap();
        let rows: Vec<u32> = store.read(|s| s.vms().map(|r| r.slot).collect());
        assert!(rows.len() as u32 > acknowledged.unwrap());
        assert_eq!(
            rows,
            (0..rows.len() as u32).collect::<Vec<_>>(),
            "the rows have no gap"
        );
    }
}
