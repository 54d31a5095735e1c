//! `op`: running and finished operations.

use super::connector::Connector;
use super::context::Context;
use super::format::{QuietListArgs, Shape, Value, field};
use super::output::{self, age};
use super::printer::Printer;
use super::progress;
use super::values::{parse_duration, timeout_ms};
use crate::api::frame::Note;
use crate::api::op::{
    Op, OpCancel, OpList, OpListRequest, OpRequest, OpShow, OpState, OpWait, OpWaitRequest,
};
use crate::client::{Failure, Result};
use crate::error::{Error, Kind};
use crate::host::text::printable;
use std::time::Duration;

#[derive(clap::Subcommand, Debug)]
pub(super) enum Verb {
    /// List operations
    #[command(visible_alias = "ls")]
    List {
        /// Also list finished operations
        #[arg(short, long)]
        all: bool,
        #[command(flatten)]
        list: QuietListArgs,
    },
    /// Show operations
    Show(Targets),
    /// Wait for operations. The exit status is 0 if all succeeded
    Wait {
        #[command(flatten)]
        targets: Targets,
        /// Give up after this time, such as 30s
        #[arg(short, long, value_name = "DURATION", value_parser = parse_duration)]
        timeout: Option<Duration>,
    },
    /// Cancel operations
    Cancel(Targets),
}

#[derive(clap::Args, Debug)]
pub(super) struct Targets {
    /// IDs or ID prefixes
    #[arg(required = true, value_name = "OP")]
    ops: Vec<String>,
}

pub(super) fn run(ctx: &mut Context, verb: Verb) -> Result<u8> {
    let Context {
        connector,
        printer,
        now_s,
        ..
    } = ctx;
    match verb {
        Verb::List { all, list: args } => {
            args.check(&SHAPE)?;
            let request = OpListRequest {
                all,
                ..Default::default()
            };
            let ops = connector.connect(printer)?.list::<OpList>(request)?;
            args.print(printer, &SHAPE, ops, *now_s)?;
            Ok(0)
        }
        Verb::Show(targets) => show(connector, printer, *now_s, &targets.ops),
        Verb::Wait { targets, timeout } => wait(connector, printer, &targets.ops, timeout),
        Verb::Cancel(targets) => cancel(connector, printer, &targets.ops),
    }
}

pub(super) const fn name(state: OpState) -> &'static str {
    match state {
        OpState::Running => "running",
        OpState::Cancelling => "cancelling",
        OpState::Ok => "ok",
        OpState::Failed => "failed",
        OpState::Cancelled => "cancelled",
    }
}

pub(super) const SHAPE: Shape<Op> = Shape {
    fields: &[
        field("ID", "ID", |op| Value::text(&op.id)),
        field("Method", "METHOD", |op| Value::text(&op.method)),
        field("VM", "VM", |op| Value::optional(op.vm.as_ref())),
        field("State", "STATE", |op| Value::text(name(op.state))),
        field("Started", "STARTED", |op| Value::Time(op.started_at)),
        field("Ended", "ENDED", |op| {
            op.ended_at.map_or(Value::Missing, Value::Time)
        }),
        field("Progress", "PROGRESS", |op| {
            Value::text(progress::line(&op.progress))
        }),
        field("Error", "ERROR", |op| {
            Value::optional(op.error.as_ref().map(|fault| &fault.message))
        }),
        field("Owner", "OWNER", |op| Value::Number(op.owner_uid.into())),
    ],
    id: |op| op.id.to_string(),
    table,
};

fn table(ops: &[Op], now_s: u64) -> String {
    let row = |op: &Op| {
        let vm = op.vm.as_ref().map(ToString::to_string).unwrap_or_default();
        let started = age(now_s, op.started_at);
        vec![
            op.id.to_string(),
            op.method.clone(),
            vm,
            name(op.state).to_owned(),
            started,
            progress::line(&op.progress),
        ]
    };
    let rows: Vec<_> = ops.iter().map(row).collect();
    let headers = ["ID", "METHOD", "VM", "STATE", "STARTED", "PROGRESS"];
    output::table(&headers, &rows)
}

fn sheet(op: &Op, now_s: u64) -> String {
    let mut facts: Vec<(&str, String)> =
        vec![("id", op.id.to_string()), ("method", op.method.clone())];
    let mut add = |name, value: Option<String>| facts.extend(value.map(|v| (name, v)));
    add("vm", op.vm.as_ref().map(ToString::to_string));
    add("state", Some(name(op.state).to_owned()));
    add(
        "progress",
        Some(progress::line(&op.progress)).filter(|p| !p.is_empty()),
    );
    for part in &op.progress.parts {
        let unit = op.progress.unit.as_deref().unwrap_or_default();
        let text = format!("{}: {}", part.name, progress::part_line(part, unit));
        add("part", Some(text));
    }
    add(
        "cancel",
        (!op.state.has_ended()).then(|| {
            if op.may_cancel {
                "possible"
            } else {
                "not possible"
            }
            .to_owned()
        }),
    );
    add("owner", Some(format!("uid {}", op.owner_uid)));
    add("started", Some(age(now_s, op.started_at)));
    add("ended", op.ended_at.map(|at| age(now_s, at)));
    add("error", op.error.as_ref().map(ToString::to_string));
    add("hint", op.error.as_ref().and_then(|e| e.hint.clone()));
    facts
        .iter()
        .map(|(name, value)| format!("{name:<9} {}\n", printable(value)))
        .collect()
}

fn show(
    connector: &mut Connector,
    printer: &mut Printer,
    now_s: u64,
    ops: &[String],
) -> Result<u8> {
    connector.for_each(printer, ops, |printer, client, op| {
        let op = client.call::<OpShow>(&OpRequest { op: op.to_owned() })?.op;
        if !printer.json {
            printer.text(&sheet(&op, now_s))?;
        }
        Ok(op)
    })
}

fn wait(
    connector: &mut Connector,
    printer: &mut Printer,
    ops: &[String],
    timeout: Option<Duration>,
) -> Result<u8> {
    let mut worst = 0;
    let status = connector.for_each(printer, ops, |printer, client, op| {
        let mut bar = printer.progress(&format!("wait for {op}"));
        let request = OpWaitRequest {
            op: op.to_owned(),
            timeout_ms: timeout_ms(timeout),
        };
        let op = client
            .call_more::<OpWait>(&request, &[], &mut |note| {
                if let Note::Progress(p) = note {
                    bar.update(&p);
                }
                Ok(())
            })?
            .op;
        drop(bar);
        if let Some(failure) = failure_of(&op) {
            let this = failure.exit_status();
            worst = if worst == 0 { this } else { worst };
            if !printer.json {
                printer.fail(&failure, this);
            }
        } else if !printer.json {
            printer.line(&format!("{}: {}", op.id, name(op.state)))?;
        }
        Ok(op)
    })?;
    Ok(if status == 0 { worst } else { status })
}

/// Returns the failure of an operation, or None if it succeeded.
fn failure_of(op: &Op) -> Option<Failure> {
    let failure = match (&op.error, op.state) {
        (_, OpState::Ok) => return None,
        (Some(fault), _) => Failure::from(fault.clone()),
        (None, OpState::Cancelled) => Error::new(Kind::Cancelled, "cancelled").into(),
        (None, state) => Error::internal(format!("it ended as {}", name(state))).into(),
    };
    Some(failure.context(format!("{} {}", op.method, op.id)))
}

fn cancel(connector: &mut Connector, printer: &mut Printer, ops: &[String]) -> Result<u8> {
    connector.for_each(printer, ops, |printer, client, op| {
        let op = client
            .call::<OpCancel>(&OpRequest { op: op.to_owned() })?
            .op;
        if !printer.json {
            printer.line(&format!("{}: {}", op.id, name(op.state)))?;
        }
        Ok(op)
    })
}
