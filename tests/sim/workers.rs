//! Runs batches of histories in processes of their own, one for each core. A killed daemon's
//! threads and memory are lost to its process, so each process plays only one batch.

use crate::Sum;
use std::process::{Child, Command, ExitCode, Output, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// The number of histories of a batch.
const BATCH: u64 = 200;

#[derive(Clone, Copy, Debug)]
pub enum Limit {
    Histories(u64),
    Time(Duration),
}

impl Limit {
    /// Parses a number of histories, or of seconds with an `s`.
    pub fn parse(text: &str) -> Option<Self> {
        match text.strip_suffix('s') {
            Some(seconds) => Some(Limit::Time(Duration::from_secs(seconds.parse().ok()?))),
            None => Some(Limit::Histories(text.parse().ok()?)),
        }
    }
}

fn start(core: usize, from: u64, count: u64) -> Child {
    let exe = std::env::current_exe().expect("the path of this program");
    // A hand-over between tasks is faster if both threads are on one core.
    let mut command = Command::new("taskset");
    command.args(["-c", &core.to_string()]).arg(exe);
    command.args(["batch", &from.to_string(), &count.to_string()]);
    command
        .stdout(Stdio::piped())
        .spawn()
        .expect("start a batch")
}

/// The batches that are left, and the sum of those that have ended.
struct Work {
    limit: Limit,
    first: u64,
    next: u64,
    began: Instant,
    sum: Sum,
    has_failed: bool,
}

impl Work {
    /// Returns the first seed and the length of the next batch.
    fn take(&mut self) -> Option<(u64, u64)> {
        let left = match self.limit {
            _ if self.has_failed => 0,
            Limit::Histories(count) => (self.first + count).saturating_sub(self.next),
            Limit::Time(most) if self.began.elapsed() < most => BATCH,
            Limit::Time(_) => 0,
        };
        let (from, count) = (self.next, left.min(BATCH));
        self.next += count;
        (count > 0).then_some((from, count))
    }

    fn ended(&mut self, output: &Output) {
        let text = String::from_utf8_lossy(&output.stdout);
        if output.status.success() {
            return self.sum.add_line(text.trim_end());
        }
        self.has_failed = true;
        println!("{text}{}", output.status);
    }
}

/// Plays histories from this seed on. Prints what they did, or the first failure.
pub fn run(limit: Limit, first: u64) -> ExitCode {
    let work = Mutex::new(Work {
        limit,
        first,
        next: first,
        began: Instant::now(),
        sum: Sum::default(),
        has_failed: false,
    });
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for core in 0..cores {
            let work = &work;
            scope.spawn(move || {
                loop {
                    let Some((from, count)) = work.lock().unwrap().take() else {
                        return;
                    };
                    let output = start(core, from, count).wait_with_output();
                    work.lock()
                        .unwrap()
                        .ended(&output.expect("wait for a batch"));
                }
            });
        }
    });
    let work = work.into_inner().unwrap();
    let took = work.began.elapsed();
    println!("seeds {first} to {}: {}", work.next - 1, work.sum.line());
    let rate = work.sum.histories() as f64 / took.as_secs_f64();
    println!("{took:.1?} on {cores} cores, {rate:.0} histories a second");
    ExitCode::from(u8::from(work.has_failed))
}
