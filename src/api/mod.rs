//! The types of the daemon's protocol: newline-delimited JSON-RPC 2.0 on a Unix socket, with one
//! call in flight per connection.
//!
//! There is one module per noun. Every call has a request type and a reply type; [`Call`] connects
//! them to the method's name. [`call`] defines the other properties of a call, [`table`] lists all
//! calls, and [`frame`] defines the envelopes.

pub mod call;
pub mod daemon;
pub mod event;
pub mod exec;
pub mod fault;
pub mod frame;
pub mod image;
pub mod kernel;
pub mod limits;
pub mod op;
pub mod page;
pub mod port;
pub mod rates;
pub mod registry;
pub mod snapshot;
pub mod stream;
pub mod table;
pub mod vm;
mod vm_brief;
mod vm_commands;
mod vm_enums;
pub mod workspace;

pub use call::Call;
pub use fault::Fault;

/// An additive change raises the minor version. Any other change raises the major version.
pub const VERSION_MAJOR: u32 = 1;
pub const VERSION_MINOR: u32 = 0;

/// The parameters of a call that has none: `{}` or omitted.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Empty {}
