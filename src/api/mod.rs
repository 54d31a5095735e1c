//! The types of the daemon's protocol: newline-delimited JSON-RPC 2.0 on a Unix socket, with one
//! call in flight per connection.
//!
//! There is one module per noun. Every call has a request type and a reply type; [`Call`] connects
//! them to the method's name. [`frame`] has the envelopes.

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
pub mod snapshot;
pub mod stream;
pub mod vm;
pub mod workspace;

pub use fault::Fault;

use serde::{Serialize, de::DeserializeOwned};

/// Additive changes raise the minor version, all others the major version.
pub const VERSION_MAJOR: u32 = 1;
pub const VERSION_MINOR: u32 = 0;

/// A method: its name, its parameters and its reply.
pub trait Call {
    const METHOD: &'static str;
    type Request: Serialize + DeserializeOwned;
    type Reply: Serialize + DeserializeOwned;
}

/// Declares the calls of one noun.
macro_rules! calls {
    ($($(#[$doc:meta])* $call:ident = $method:literal ($request:ty) -> $reply:ty;)*) => {
        $($(#[$doc])* pub struct $call;
        impl $crate::api::Call for $call {
            const METHOD: &'static str = $method;
            type Request = $request;
            type Reply = $reply;
        })*
        /// Every method of this noun.
        pub const METHODS: &[&str] = &[$($method),*];
    };
}
pub(crate) use calls;

/// The parameters of a call that has none: `{}` or omitted.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Empty {}
