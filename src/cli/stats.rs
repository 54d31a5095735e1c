//! `vm stats`: how much of the host each VM uses.

use super::context::Context;
use super::output::{size, table};
use super::selection::{Filter, targets};
use crate::api::vm::{VmStats, VmStatsCall, VmStatsRequest};
use crate::client::{Client, Failure, Result};
use crate::error::Error;
use std::time::{Duration, Instant};

/// The time between the two samples that CPU usage is computed from.
const PERIOD: Duration = Duration::from_secs(1);
/// Clears a terminal and moves to its first line (ECMA-48: CUP, ED).
const CLEAR: &str = "\u{1b}[H\u{1b}[2J";

#[derive(clap::Args, Debug)]
pub(super) struct Args {
    /// Names, IDs, or ID prefixes [default: all running VMs]
    #[arg(value_name = "VM", conflicts_with = "filters")]
    vms: Vec<String>,
    #[command(flatten)]
    filter: Filter,
    /// Refresh until interrupted
    #[arg(short, long)]
    watch: bool,
}

pub(super) fn run(ctx: &mut Context, args: Args) -> Result<u8> {
    let Context {
        connector,
        printer,
        stdio,
        ..
    } = ctx;
    if printer.json && args.watch {
        return Err(
            Error::invalid("--watch never ends, so it cannot be one JSON document")
                .hint("leave out --json or --watch")
                .into(),
        );
    }
    // Leave out VMs that match a filter but do not run.
    let chosen = match args.filter.is_empty() {
        true => None,
        false => Some(targets(connector, printer, &[], &args.filter)?),
    };
    let is_chosen = |stats: &VmStats| {
        let mut chosen = chosen.iter().flatten();
        chosen.any(|target| target.vm == stats.vm.as_str())
    };
    let mut client = connector.connect(printer)?;
    let request = VmStatsRequest {
        vms: args.vms,
        ..Default::default()
    };
    let look = |client: &mut Client| {
        let mut stats = client.list::<VmStatsCall>(request.clone())?;
        if chosen.is_some() {
            stats.retain(is_chosen);
        }
        if request.vms.is_empty() {
            stats.sort_by(|a, b| a.name.cmp(&b.name));
        }
        Ok::<_, Failure>(stats)
    };
    let mut before = look(&mut client)?;
    if printer.json {
        printer.document(&before)?;
        return Ok(0);
    }
    loop {
        crate::host::wait::wait_uncancelled(&[], Instant::now() + PERIOD)
            .map_err(|e| Error::io("wait a moment", e))?;
        let now = look(&mut client)?;
        let clear = if args.watch && stdio.stdout_is_terminal() {
            CLEAR
        } else {
            ""
        };
        printer.text(&format!("{clear}{}", render(&before, &now)))?;
        if !args.watch || printer.is_unread() {
            return Ok(0);
        }
        before = now;
    }
}

fn render(before: &[VmStats], now: &[VmStats]) -> String {
    let rows: Vec<_> = now
        .iter()
        .map(|vm| row(before.iter().find(|b| b.vm == vm.vm), vm))
        .collect();
    table(
        &[
            "NAME",
            "CPU",
            "MEMORY",
            "OF",
            "DISK READ",
            "WRITTEN",
            "NET RECEIVED",
            "SENT",
        ],
        &rows,
    )
}

fn row(before: Option<&VmStats>, now: &VmStats) -> Vec<String> {
    let bytes = |count: Option<u64>| count.map_or_else(|| "-".to_owned(), size);
    vec![
        now.name.to_string(),
        before
            .and_then(|b| share(b, now))
            .map_or_else(|| "-".to_owned(), |percent| format!("{percent}%")),
        size(now.memory_bytes),
        size(now.memory_max_bytes),
        bytes(now.disk_read_bytes),
        bytes(now.disk_written_bytes),
        bytes(now.net_received_bytes),
        bytes(now.net_sent_bytes),
    ]
}

/// Returns the CPU usage in percent of one CPU, so two busy CPUs are 200. None if another VMM
/// process runs the VM now, or if no time has passed.
fn share(before: &VmStats, now: &VmStats) -> Option<u64> {
    let used_us = now.cpu_ns.checked_sub(before.cpu_ns)? / 1000;
    let passed_ms = now.at_ms.checked_sub(before.at_ms).filter(|ms| *ms > 0)?;
    Some((used_us + 5 * passed_ms) / (10 * passed_ms))
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::expect;

    fn stats(at_ms: u64, cpu_ms: u64) -> VmStats {
        VmStats {
            vm: "0123456789ab".parse().unwrap(),
            name: "web".parse().unwrap(),
            at_ms,
            cpu_ns: cpu_ms * 1_000_000,
            memory_bytes: 300 << 20,
            memory_max_bytes: 1 << 30,
            disk_read_bytes: Some(5 << 20),
            disk_written_bytes: None,
            net_received_bytes: None,
            net_sent_bytes: Some(7),
        }
    }

    #[test]
    fn stats_cpu_share_is_of_one_cpu() {
        assert_eq!(share(&stats(1000, 0), &stats(2000, 1500)), Some(150));
        assert_eq!(share(&stats(1000, 0), &stats(2000, 4)), Some(0));
        assert_eq!(share(&stats(1000, 0), &stats(2000, 6)), Some(1));
        assert_eq!(
            share(&stats(1000, 9), &stats(2000, 0)),
            None,
            "another process"
        );
        assert_eq!(share(&stats(1000, 0), &stats(1000, 0)), None);
    }

    #[test]
    fn stats_are_printed_as_table() {
        let mut other = stats(2000, 0);
        other.vm = "ba9876543210".parse().unwrap();
        expect![[r"
            NAME  CPU  MEMORY   OF     DISK READ  WRITTEN  NET RECEIVED  SENT
            web   25%  300 MiB  1 GiB  5 MiB      -        -             7 B
            web   -    300 MiB  1 GiB  5 MiB      -        -             7 B
        "]]
        .assert_eq(&render(&[stats(1000, 0)], &[stats(2000, 250), other]));
    }
}
