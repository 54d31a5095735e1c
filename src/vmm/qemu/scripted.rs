//! A QMP server that follows a script, for tests.

use super::qmp::Qmp;
use crate::error::Result;
use crate::locks::Cancel;
use crate::sched::Instant;
use crate::vmm::dial::Deadline;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

pub(super) const GREETING: &str = "{\"QMP\": {\"version\": {}, \"capabilities\": []}}\r\n";

/// Runs `with` against a server that sends `script` regardless of the requests. The client's
/// deadline is `ms` milliseconds away. Returns the result of `with`, and the requests.
pub(super) fn talk<T>(
    script: &str,
    ms: u64,
    with: impl FnOnce(Result<Qmp<'_>>, &Cancel) -> T,
) -> (T, String) {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    theirs.write_all(script.as_bytes()).unwrap();
    let cancel = Cancel::try_new().unwrap();
    let deadline = Deadline {
        at: Instant::now() + Duration::from_millis(ms),
        cancel: &cancel,
    };
    let result = with(Qmp::open(ours, deadline), &cancel);
    let mut asked = String::new();
    theirs.read_to_string(&mut asked).unwrap();
    (result, asked)
}
