//! The properties of a call that the daemon checks before it reads the parameters.
//!
//! Each noun of the API, such as `vm` or `exec`, lists its calls with the macro `calls!`. Each row
//! has the method's name, the types of its request and its reply, and the fields of [`CallInfo`].
//! The server uses the rows to route and check calls, and the protocol's documentation lists them.

use serde::{Serialize, de::DeserializeOwned};

/// A method: its name, its parameters and its reply.
pub trait Call {
    const METHOD: &'static str;
    type Request: Serialize + DeserializeOwned;
    type Reply: Serialize + DeserializeOwned;
}

/// The row of a call in the list of its noun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallInfo {
    pub method: &'static str,
    pub access: Access,
    pub key: Key,
    pub on_disconnect: OnDisconnect,
    pub fds: FdPassing,
    /// The feature name that `fcd.info` reports for this call. None if the call has been in the
    /// protocol since its first version.
    pub feature: Option<&'static str>,
}

/// The users who may make a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Every user. A list contains only what the caller may see, except that all users share images
    /// and kernels.
    Anybody,
    /// Root and the owner of the object that the call names.
    Owner,
    /// Root and the user who runs the daemon.
    Privileged,
}

/// The use of an idempotency key by a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    Keyed,
    Unkeyed,
}

/// The consequence if the caller disconnects before the reply. Only operations use the last two
/// variants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnDisconnect {
    /// The call is completed.
    Nothing,
    /// The call ends. Calls that wait, send notes or run a command use this.
    EndCall,
    CancelOperation,
    FinishOperation,
}

/// The direction in which file descriptors are passed with a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FdPassing {
    NoFds,
    /// The caller sends descriptors with the request.
    TakesFds,
    /// The daemon sends a descriptor with the reply.
    ReturnsFd,
}

impl OnDisconnect {
    pub fn is_operation(self) -> bool {
        matches!(self, Self::CancelOperation | Self::FinishOperation)
    }
}

/// Declares the calls whose methods begin with the same noun, such as `vm.` or `image.`.
macro_rules! calls {
    ($($(#[$doc:meta])* $call:ident = $method:literal ($request:ty) -> $reply:ty
        [$access:ident, $key:ident, $on_disconnect:ident, $fds:ident $(, feature $feature:literal)?];)*) => {
        $($(#[$doc])* pub struct $call;
        impl $crate::api::Call for $call {
            const METHOD: &'static str = $method;
            type Request = $request;
            type Reply = $reply;
        })*

        /// Every call of this noun.
        pub const CALLS: &[$crate::api::call::CallInfo] = &[$($crate::api::call::CallInfo {
            method: $method,
            access: $crate::api::call::Access::$access,
            key: $crate::api::call::Key::$key,
            on_disconnect: $crate::api::call::OnDisconnect::$on_disconnect,
            fds: $crate::api::call::FdPassing::$fds,
            feature: [$(Some($feature),)? None][0],
        }),*];

        /// A call of this noun with its parameters.
        // Every variant begins with the noun, because it is named after its request type.
        #[allow(clippy::enum_variant_names, clippy::large_enum_variant)]
        pub enum NounCall {
            $($call($request)),*
        }

        impl NounCall {
            /// Parses the parameters of a call. Returns None if the noun does not have this method.
            pub fn parse(method: &str, params: &str) -> Option<serde_json::Result<Self>> {
                match method {
                    $($method => Some(serde_json::from_str(params).map(Self::$call)),)*
                    _ => None,
                }
            }
        }
    };
}
pub(crate) use calls;
