//! Fuzzes the readers of hostile bytes. `scripts/fuzz` builds and runs it. ARCHITECTURE.md says how
//! to add a target.
//!
//! The fuzzer has its own loop because it must run on the stable toolchain. LLVM's `sancov-module`
//! pass counts the edges (`coverage.rs`), an input that reaches a new edge is added to the corpus,
//! and `mutate.rs` changes a corpus entry for each execution. Without the pass the fuzzer mutates
//! the seeds blindly. A run depends only on its seed, so it can be repeated.
//!
//! A target fails when it panics, allocates more than its bound, or takes more than
//! [`EXECUTION_MAX`]. The fuzzer then shrinks the input as long as it still fails, and writes it to
//! a file.

mod allocations;
mod coverage;
mod mutate;

use coverage::Coverage;
use mutate::Mutator;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

#[global_allocator]
static ALLOCATOR: allocations::Counting = allocations::Counting;

/// Limit of an input's length. No reader keeps more.
const INPUT_BYTES_MAX: usize = 192 * 1024;
const SHORT_INPUT_BYTES_MAX: usize = 8 * 1024;
/// Limit of the time of one execution. A longer execution is a failure. The limit is generous for a
/// busy machine.
const EXECUTION_MAX: Duration = Duration::from_secs(5);
/// The time after which SIGALRM ends the process, because an execution hangs.
const ALARM_S: u32 = 60;
/// The time between two progress lines.
const REPORT_PERIOD: Duration = Duration::from_secs(10);
/// Limit of the attempts to shrink a failing input.
const SHRINKS_MAX: usize = 20_000;

struct Target {
    name: &'static str,
    run: fn(&[u8]),
    /// Limit of the memory that one execution may hold at once, in addition to the input.
    memory_max: usize,
    /// Limit of an input's length. A reader of short texts gets short inputs, so that it gets more
    /// of them.
    input_bytes_max: usize,
    /// Words that mutations insert because random changes do not find them.
    words: &'static [&'static str],
}

/// All targets. To add a target, add it here and put valid inputs in `seeds/NAME/`.
const TARGETS: [Target; 16] = [
    Target {
        name: "qmp",
        run: fcd::testing::vmm::fuzz::qmp,
        memory_max: 64 << 20,
        input_bytes_max: INPUT_BYTES_MAX,
        words: &[
            "\r\n",
            "{\"return\": ",
            "{\"event\": \"",
            "{\"event\": \"SHUTDOWN\", \"data\": {\"reason\": \"",
            "{\"error\": {\"class\": \"",
            "\"desc\": \"",
            "\"QMP\": ",
            "[[[[[[[[",
            "\\u0000",
        ],
    },
    Target {
        name: "root-disk",
        run: fcd::testing::disk::fuzz::root_disk,
        memory_max: 1 << 20,
        input_bytes_max: INPUT_BYTES_MAX,
        words: &["QFI", "\u{0}\u{0}\u{0}\u{10}"],
    },
    Target {
        name: "firecracker-http",
        run: fcd::testing::vmm::fuzz::firecracker_http,
        memory_max: 64 << 20,
        input_bytes_max: INPUT_BYTES_MAX,
        words: &[
            "\r\n\r\n",
            "HTTP/1.1 200 \r\n",
            "Content-Length: ",
            "Transfer-Encoding: chunked\r\n",
            "Deprecation: true\r\n",
            "{\"fault_message\":\"",
            "18446744073709551615",
            "65536",
        ],
    },
    Target {
        name: "firecracker-metrics",
        run: fcd::testing::vmm::fuzz::firecracker_metrics,
        memory_max: 64 << 20,
        input_bytes_max: INPUT_BYTES_MAX,
        words: &["\n", "{\"utc_timestamp_ms\":", "[[[[[[[[", "{\"\":{\"\":"],
    },
    Target {
        name: "console",
        run: fcd::testing::vmm::fuzz::console,
        memory_max: 16 << 20,
        input_bytes_max: INPUT_BYTES_MAX,
        words: &[
            "\r\n",
            "\u{e9}",
            "\u{1f600}",
            "Kernel panic - not syncing: ",
            "--- fcd: ",
        ],
    },
    Target {
        name: "helper-replies",
        run: fcd::testing::guest::helper::fuzz::replies,
        memory_max: 1 << 20,
        input_bytes_max: INPUT_BYTES_MAX,
        words: &[
            "\u{1}",
            "\u{2}",
            "\u{4}\u{4}",
            "\u{0}\u{0}\u{0}",
            "\u{1b}[2J",
            "\u{202e}",
            "TERM",
        ],
    },
    Target {
        name: "helper-orders",
        run: fcd::testing::guest::helper::fuzz::orders,
        memory_max: 1 << 20,
        input_bytes_max: INPUT_BYTES_MAX,
        words: &[
            "\u{1}",
            "\u{2}",
            "\u{3}",
            "\u{4}\u{0}\u{0}\u{0}",
            "root",
            "xterm",
            "USR1",
        ],
    },
    Target {
        name: "guest-listeners",
        run: fcd::testing::guest::fuzz::listeners,
        memory_max: 1 << 20,
        input_bytes_max: SHORT_INPUT_BYTES_MAX,
        words: &[
            "\n",
            ":",
            "00000000:0BB8\n",
            "0F02000A:FFFF\n",
            "00000000000000000000000000000000:0400\n",
            "0000000000000000FFFF0000",
        ],
    },
    Target {
        name: "dns-packets",
        run: fcd::testing::net::dns::fuzz::packets,
        memory_max: 1 << 20,
        input_bytes_max: INPUT_BYTES_MAX,
        words: &[
            "\u{2}vm\u{0}",
            "\u{3}web",
            "\u{7}in-addr\u{4}arpa\u{0}",
            "\u{0}\u{1}\u{0}\u{1}",
            "\u{0}\u{0}\u{29}",
            "\u{0}\u{c}",
        ],
    },
    Target {
        name: "dns-requests",
        run: fcd::testing::net::dns::fuzz::requests,
        memory_max: 1 << 20,
        input_bytes_max: INPUT_BYTES_MAX,
        words: &[
            "\u{0}\u{5}\u{8}\u{0}\u{0}\u{0}\u{0}",
            "\u{0}\u{6}\u{6}\u{1}\u{0}\u{0}\u{0}\u{1}",
            "\u{0}\u{9}\u{5}\u{1}\u{0}\u{0}\u{0}\u{a}Y\u{0}\u{5}",
            "\u{0}\u{c}\u{4}\u{1}\u{0}\u{0}\u{0}\u{3}\u{0}\u{0}\u{0}web",
            "\u{1b}[2J",
        ],
    },
    Target {
        name: "image-reference",
        run: fcd::testing::image::oci::fuzz::reference,
        memory_max: 1 << 20,
        input_bytes_max: SHORT_INPUT_BYTES_MAX,
        words: &[
            "docker://",
            "docker.io/library/",
            "@sha256:",
            ":5000/",
            "[::1]",
            "__",
        ],
    },
    Target {
        name: "image-manifest",
        run: fcd::testing::image::oci::fuzz::manifest,
        memory_max: 64 << 20,
        input_bytes_max: INPUT_BYTES_MAX,
        words: &[
            "\u{0}",
            "\"manifests\":[",
            "{\"schemaVersion\":2,\"manifests\":[]}",
            "\"layers\":[",
            "\"mediaType\":\"application/vnd.oci.image.",
            "\"platform\":{\"os\":\"linux\",\"architecture\":\"amd64\"}",
            "[[[[[[[[",
            "18446744073709551615",
        ],
    },
    Target {
        name: "registry-replies",
        run: fcd::testing::image::fetch::fuzz::replies,
        memory_max: 16 << 20,
        input_bytes_max: SHORT_INPUT_BYTES_MAX,
        words: &[
            "Bearer realm=\"",
            "https://registry.example/",
            "https://",
            "http://",
            "127.0.0.1",
            "[::ffff:127.0.0.1]",
            "169.254.169.254",
            "bytes ",
            "{\"errors\":[{\"code\":\"",
            "{\"token\":\"",
            "HTTP/1.1 200 \r\n\r\n",
            "\n",
            "@",
        ],
    },
    Target {
        name: "image-layer",
        run: fcd::testing::image::oci::fuzz::layer,
        memory_max: 64 << 20,
        input_bytes_max: INPUT_BYTES_MAX,
        words: &[
            "ustar  \u{0}",
            "ustar\u{0}00",
            "././@LongLink",
            "SCHILY.xattr.user.",
            "13 size=1000\n",
            "../",
            ".wh.",
        ],
    },
    Target {
        name: "image-ext4",
        run: fcd::testing::image::ext4::fuzz::ext4,
        memory_max: 64 << 20,
        input_bytes_max: INPUT_BYTES_MAX,
        words: &["\u{a}\u{f3}", ".wh.", "..", "/", "lost+found"],
    },
    Target {
        name: "image-merge",
        run: fcd::testing::image::oci::fuzz::merge,
        memory_max: 64 << 20,
        input_bytes_max: SHORT_INPUT_BYTES_MAX,
        words: &[
            "\n-\n",
            "\nd",
            "\nf",
            "\nl",
            "\nh",
            ".wh.",
            ".wh..wh..opq",
            "\t/",
            "\t../",
            "/a/b",
        ],
    },
];

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let (name, seconds, seed) = match args.as_slice() {
        ["--list"] => {
            TARGETS
                .iter()
                .for_each(|target| println!("{}", target.name));
            return ExitCode::SUCCESS;
        }
        [name, "--input", file] => return replay(name, Path::new(file)),
        [name, seconds] => (*name, seconds.parse(), Ok(1)),
        [name, seconds, seed] => (*name, seconds.parse(), seed.parse()),
        _ => return usage(),
    };
    let (Some(target), Ok(seconds), Ok(seed)) = (find(name), seconds, seed) else {
        return usage();
    };
    fuzz(target, Duration::from_secs(seconds), seed)
}

fn usage() -> ExitCode {
    eprintln!("usage: fuzz TARGET SECONDS [SEED] | fuzz TARGET --input FILE | fuzz --list");
    ExitCode::from(2)
}

fn find(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}

fn replay(name: &str, file: &Path) -> ExitCode {
    let Some(target) = find(name) else {
        return usage();
    };
    match std::fs::read(file).map(|input| execute(target, &input)) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(why)) => {
            eprintln!("fuzz {name}: {why}");
            ExitCode::FAILURE
        }
        Err(e) => {
            eprintln!("read {}: {e}", file.display());
            ExitCode::from(2)
        }
    }
}

fn fuzz(target: &Target, time: Duration, seed: u64) -> ExitCode {
    std::panic::set_hook(Box::new(|_| ()));
    let begun = Instant::now();
    let mut next_report = begun + REPORT_PERIOD;
    let (mut corpus, mut seen) = (Vec::new(), Coverage::default());
    let mut executions = 0u64;
    for input in seeds(target.name) {
        if let Err(why) = execute(target, &input) {
            return failed(target, input, &why, executions, seed);
        }
        seen.add();
        corpus.push(input);
    }
    let mut mutator = Mutator::new(seed, target.words, target.input_bytes_max);
    while begun.elapsed() < time {
        let input = mutator.next(&corpus);
        executions += 1;
        nix::unistd::alarm::set(ALARM_S);
        if let Err(why) = execute(target, &input) {
            return failed(target, input, &why, executions, seed);
        }
        if seen.add() {
            corpus.push(input);
        }
        if Instant::now() >= next_report {
            next_report += REPORT_PERIOD;
            report(target, begun, (executions, seed), &corpus, &seen);
        }
    }
    report(target, begun, (executions, seed), &corpus, &seen);
    ExitCode::SUCCESS
}

fn report(
    target: &Target,
    begun: Instant,
    (executions, seed): (u64, u64),
    corpus: &[Vec<u8>],
    seen: &Coverage,
) {
    let edges = seen.edges().map_or_else(
        || "no coverage".to_owned(),
        |edges| format!("{edges} edges"),
    );
    let seconds = begun.elapsed().as_secs();
    println!(
        "{}: {executions} executions in {seconds} s, {edges}, {} inputs, seed {seed}",
        target.name,
        corpus.len()
    );
}

fn seeds(name: &str) -> Vec<Vec<u8>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fuzz/seeds")
        .join(name);
    let mut files: Vec<PathBuf> = std::fs::read_dir(&dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|item| item.path())
        .collect();
    // The files are sorted so that a run can be repeated.
    files.sort();
    let seeds: Vec<_> = files
        .iter()
        .filter_map(|file| std::fs::read(file).ok())
        .collect();
    assert!(!seeds.is_empty(), "no seeds in {}", dir.display());
    seeds
}

/// Runs the target once. Returns an error with the reason if the target fails.
fn execute(target: &Target, input: &[u8]) -> Result<(), String> {
    coverage::reset();
    let begun = Instant::now();
    let before = allocations::mark();
    let result = catch_unwind(AssertUnwindSafe(|| (target.run)(input)));
    let held = allocations::peak_since(before);
    if let Err(panic) = result {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text
            .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
            .unwrap_or_default();
        return Err(format!(
            "panicked: {}",
            text.chars().take(400).collect::<String>()
        ));
    }
    if held > target.memory_max {
        return Err(format!(
            "held {held} bytes, more than {}",
            target.memory_max
        ));
    }
    let took = begun.elapsed();
    if took > EXECUTION_MAX {
        return Err(format!("took {took:?}"));
    }
    Ok(())
}

fn failed(target: &Target, input: Vec<u8>, why: &str, executions: u64, seed: u64) -> ExitCode {
    let small = shrink(target, input);
    let file = std::env::var_os("FCD_FUZZ_FOUND").map_or_else(std::env::temp_dir, PathBuf::from);
    let file = file.join(format!("fuzz-{}-{seed}-{executions}", target.name));
    let written = std::fs::write(&file, &small);
    eprintln!(
        "fuzz {}: FOUND after {executions} executions, seed {seed}: {why}",
        target.name
    );
    eprintln!(
        "input of {} bytes: {:?}",
        small.len(),
        String::from_utf8_lossy(&small[..small.len().min(200)])
    );
    match written {
        Ok(()) => eprintln!(
            "repeat: scripts/fuzz {} --input {}",
            target.name,
            file.display()
        ),
        Err(e) => eprintln!("write {}: {e}", file.display()),
    }
    ExitCode::FAILURE
}

/// Shrinks a failing input by removing smaller and smaller pieces. The result still fails.
fn shrink(target: &Target, mut input: Vec<u8>) -> Vec<u8> {
    let mut tries = 0;
    let mut piece = input.len().div_ceil(2);
    while piece > 0 {
        let mut at = 0;
        while at < input.len() && tries < SHRINKS_MAX {
            tries += 1;
            let mut without = input.clone();
            without.drain(at..(at + piece).min(input.len()));
            if execute(target, &without).is_err() {
                input = without;
            } else {
                at += piece;
            }
        }
        piece /= 2;
    }
    input
}
