//! The integration test binary. It runs a daemon in-process in a temporary directory, with fakes
//! for the VMM, the guest and the host's commands.

#![allow(clippy::disallowed_methods, clippy::disallowed_types)]

mod adjusting;
mod apart;
mod api;
mod auto_ports;
mod bad_input;
mod booting;
mod capabilities;
mod closing;
mod command_defaults;
mod commits;
mod completions;
mod copying;
mod crash;
mod crowd;
mod docs;
mod durability;
mod edges;
mod event_wire;
mod events;
mod firecracker;
mod footprint;
mod guest_runtime;
mod helper_cost;
mod hostile_guest;
mod image_bytes;
mod image_commit;
mod image_export;
mod image_names;
mod image_races;
mod image_register;
mod install_firecracker;
mod kernels;
mod keys;
mod late;
mod layers;
mod lists;
mod manual;
// These modules use the lock checker.
#[cfg(any(debug_assertions, feature = "lock-check"))]
mod lock_fuzz;
#[cfg(any(debug_assertions, feature = "lock-check"))]
mod lock_reports;
#[cfg(any(debug_assertions, feature = "lock-check"))]
mod lost_updates;
mod panics;
mod pauses;
mod points;
mod ports;
mod process;
mod promise;
mod pulls;
mod recovery;
mod recovery_budget;
mod running;
mod scale;
mod scale_calls;
mod setup;
mod shape;
mod snapshots;
mod stall;
mod stalled_log;
mod terminal;
mod tidy;
mod transcripts;
mod under_locks;
mod under_sched;
mod uninstall;
mod unrecorded;
mod users;
mod verbs;
mod world;
