//! Describes what a thread of this process is doing, for reports about threads that delay others.

/// Returns the state of a thread of this process, with the place in the kernel and the system call
/// in which it sleeps, if the kernel shows them. Returns `None` if the thread has ended.
pub fn thread_activity(tid: i32) -> Option<String> {
    crate::locks::may_block("look at a thread");
    let read = |name: &str| std::fs::read_to_string(format!("/proc/self/task/{tid}/{name}")).ok();
    let stat = read("stat")?;
    let state = stat.rsplit_once(") ")?.1.chars().next()?;
    let mut text = match state {
        'R' => "runs".to_owned(),
        'S' => "sleeps".to_owned(),
        'D' => "waits for a device".to_owned(),
        other => format!("is in state {other}"),
    };
    if let Some(place) = read("wchan").filter(|place| !matches!(place.as_str(), "" | "0")) {
        text += &format!(" in {place}");
    }
    let call = read("syscall").and_then(|s| s.split(' ').next()?.parse::<u32>().ok());
    if let Some(number) = call {
        text += &format!(" (system call {number})");
    }
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn blocked_reader_sleeps_in_read() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let (sender, receiver) = std::sync::mpsc::channel();
        let reading = crate::host::thread::spawn("reading", move || {
            let tid = nix::unistd::gettid().as_raw();
            sender.send(tid).unwrap();
            reader.read_exact(&mut [0])
        })
        .unwrap();
        let tid = receiver.recv().unwrap();
        let deadline = crate::sched::Instant::now() + std::time::Duration::from_secs(20);
        while !thread_activity(tid).unwrap().starts_with("sleeps") {
            assert!(crate::sched::Instant::now() < deadline);
            std::thread::yield_now();
        }
        drop(writer);
        reading.join().unwrap().unwrap_err();
        assert_eq!(thread_activity(0), None);
    }
}
