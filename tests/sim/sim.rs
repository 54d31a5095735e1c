//! Simulates the whole daemon, from seeds. `scripts/sim` runs this program.
//!
//! Usage: `sim run COUNT|SECONDSs [FIRST SEED]`, `sim replay NAME [TIMES]`. See `scripts/sim`.
//!
//! A history has requests of four callers on two VMs, and one fault: an effect or a commit fails,
//! takes long, or the daemon is killed there and the next one finds what it left. The scheduler of
//! `src/sched/sim` takes every decision from the seed, so a history that fails can be repeated.

#![allow(clippy::disallowed_methods, clippy::disallowed_types)]

mod actor;
mod client;
mod history;
mod plan;
mod points;
#[allow(dead_code, reason = "the threaded fuzz counts more")]
#[path = "../it/lock_fuzz/replay.rs"]
mod replay;
mod shrink;
mod watcher;
mod workers;
mod world;

use history::{Played, play};
use plan::{Name, Plan};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

fn place() -> PathBuf {
    let base = PathBuf::from("/dev/shm");
    let base = if base.is_dir() {
        base
    } else {
        std::env::temp_dir()
    };
    base.join(format!("fcd-sim-{}", std::process::id()))
}

fn number(text: Option<String>, otherwise: u64) -> u64 {
    text.map_or(otherwise, |text| text.parse().expect("a number"))
}

/// Makes a panic the failure of its history.
fn report_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let text = format!("{panic}\n{}", std::backtrace::Backtrace::capture());
        fcd::testing::sched::sim::fail(&text);
        eprintln!("{text}");
    }));
}

/// Prints the log of a history that is repeated.
struct Log;

impl log::Log for Log {
    fn enabled(&self, _metadata: &log::Metadata<'_>) -> bool {
        true
    }
    fn log(&self, record: &log::Record<'_>) {
        fcd::testing::locks::check::log_call(record);
        if IS_VERBOSE.load(Ordering::Relaxed) {
            let name = fcd::testing::sched::current();
            let name = name.name().unwrap_or("?").to_owned();
            let now = fcd::testing::sched::sim::since_begin();
            println!("{now:?} {name}: {}", record.args());
        }
    }
    fn flush(&self) {}
}

static IS_VERBOSE: AtomicBool = AtomicBool::new(false);

/// Plays histories `from..from + count`. Prints the figures, or the failure.
fn batch(from: u64, count: u64) -> ExitCode {
    let mut sum = Sum::default();
    for seed in from..from + count {
        let named = Name::whole(seed);
        let played = play(&named, &place());
        if let Some(why) = &played.failure {
            report(&named, why);
            return ExitCode::FAILURE;
        }
        // Every batch repeats its first history, to see that it takes the same path.
        if seed == from && play(&named, &place()).figures != played.figures {
            println!("FCD_SIM_SEED={named}\ntwo runs took different paths");
            return ExitCode::FAILURE;
        }
        sum.add(&played);
    }
    println!("{}", sum.line());
    ExitCode::SUCCESS
}

/// Prints a failure with the shortest list of requests that shows it.
fn report(named: &Name, why: &str) {
    println!("FCD_SIM_SEED={named}\n{why}");
    let mut last = why.to_owned();
    let mut fails = |name: &Name| match play(name, &place()).failure {
        Some(why) => {
            last = why;
            true
        }
        None => false,
    };
    let shortest = shrink::shrink(named, &mut fails);
    println!("shortest: FCD_SIM_SEED={shortest}\n{last}");
    print_plan(&shortest);
}

fn print_plan(name: &Name) {
    let plan = Plan::draw(name);
    for request in &plan.requests {
        println!(
            "  caller {} vm-{}: {:?}",
            request.caller, request.vm, request.ask
        );
    }
    println!("  {:?}, {:?}", plan.fault, plan.policy);
}

/// Counts of many histories.
#[derive(Clone, Copy, Debug, Default)]
struct Sum {
    histories: u64,
    requests: u64,
    kills: u64,
    hits: u64,
    checked: u64,
    points: u64,
    switches: u64,
    polls: u64,
    tasks: u64,
}

impl Sum {
    const NAMES: [&str; 9] = [
        "histories",
        "requests",
        "kills",
        "faults",
        "explained",
        "points",
        "switches",
        "polls",
        "tasks",
    ];

    fn numbers(&mut self) -> [&mut u64; 9] {
        [
            &mut self.histories,
            &mut self.requests,
            &mut self.kills,
            &mut self.hits,
            &mut self.checked,
            &mut self.points,
            &mut self.switches,
            &mut self.polls,
            &mut self.tasks,
        ]
    }

    /// Formats the counts as [`Sum::add_line`] reads them.
    fn line(mut self) -> String {
        let numbers = self.numbers().map(|n| n.to_string());
        let pairs = numbers.iter().zip(Self::NAMES);
        let texts: Vec<_> = pairs.map(|(n, name)| format!("{n} {name}")).collect();
        texts.join(", ")
    }

    /// Adds the counts of another process.
    fn add_line(&mut self, line: &str) {
        for (sum, part) in self.numbers().into_iter().zip(line.split(", ")) {
            let number = part.split(' ').next().unwrap_or_default();
            *sum += number.parse::<u64>().unwrap_or_default();
        }
    }

    fn histories(&self) -> u64 {
        self.histories
    }

    fn add(&mut self, played: &Played) {
        self.histories += 1;
        self.requests += played.counts.requests;
        self.kills += played.counts.kills;
        self.hits += u64::from(played.hit.is_some());
        self.checked += played.counts.checked;
        self.points += played.figures.points;
        self.switches += played.figures.switches;
        self.polls += played.figures.polls;
        self.tasks += played.figures.tasks;
    }
}

fn replay(name: &Name, times: u64) -> ExitCode {
    print_plan(name);
    IS_VERBOSE.store(times == 1, Ordering::Relaxed);
    let mut failures = 0;
    for _ in 0..times {
        let played = play(name, &place());
        println!(
            "{:?} {:?} hit {:?}",
            played.figures, played.counts, played.hit
        );
        if let Some(why) = played.failure {
            println!("{why}");
            failures += 1;
        }
    }
    println!("{failures} of {times} failed");
    ExitCode::from(u8::from(failures > 0))
}

fn main() -> ExitCode {
    report_panics();
    log::set_logger(&Log).expect("the first logger");
    log::set_max_level(log::LevelFilter::Trace);
    let mut args = std::env::args().skip(1);
    match args.next().as_deref() {
        Some("batch") => batch(number(args.next(), 1), number(args.next(), 100)),
        Some("run") => {
            let limit = workers::Limit::parse(&args.next().unwrap_or_default());
            workers::run(
                limit.expect("a count, or seconds with an s"),
                number(args.next(), 1),
            )
        }
        Some("replay") => {
            let name = args
                .next()
                .as_deref()
                .and_then(Name::parse)
                .expect("a name");
            replay(&name, number(args.next(), 1))
        }
        _ => ExitCode::from(64),
    }
}
