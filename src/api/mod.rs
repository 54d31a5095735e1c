//! What crosses the wire: newline-delimited JSON-RPC 2.0 on a Unix socket, one call in flight per connection.
//! One request type and one reply type per call; [`Call`] ties a method's name to both.

pub mod daemon;
pub mod event;
pub mod exec;
pub mod fault;
pub mod frame;
pub mod image;
pub mod kernel;
pub mod op;
pub mod page;
pub mod port;
pub mod snapshot;
pub mod stream;
pub mod vm;
pub mod workspace;

pub use fault::Fault;

use serde::{Serialize, de::DeserializeOwned};

/// Additive changes raise the minor, anything else the major.
pub const VERSION_MAJOR: u32 = 1;
pub const VERSION_MINOR: u32 = 0;

/// A method: its name, its parameters, what it answers.
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

/// A call without parameters: `{}` or nothing.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Empty {}
