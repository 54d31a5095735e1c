//! The table of all calls, built from the lists of the nouns.

use super::call::CallInfo;
use super::{daemon, event, exec, image, kernel, op, snapshot, vm, workspace};

macro_rules! nouns {
    ($($noun:ident: $Noun:ident),*) => {
        /// A call with its parameters.
        pub enum AnyCall {
            $($Noun($noun::NounCall)),*
        }

        impl AnyCall {
            /// Parses the parameters of a call. Returns None if there is no such method.
            pub fn parse(method: &str, params: &str) -> Option<serde_json::Result<Self>> {
                $(if let Some(call) = $noun::NounCall::parse(method, params) {
                    return Some(call.map(Self::$Noun));
                })*
                None
            }
        }

        const NOUNS: &[&[CallInfo]] = &[$($noun::CALLS),*];
    };
}

nouns! {
    vm: Vm, exec: Exec, workspace: Workspace, snapshot: Snapshot, image: Image, kernel: Kernel, op: Op, event: Event,
    daemon: Daemon
}

/// Returns every call, in the order of the documentation.
pub fn calls() -> impl Iterator<Item = &'static CallInfo> {
    NOUNS.iter().copied().flatten()
}

pub fn find(method: &str) -> Option<&'static CallInfo> {
    calls().find(|call| call.method == method)
}

/// Returns the names of the features that were added since the first version of the protocol.
pub fn features() -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for name in calls().filter_map(|call| call.feature) {
        if !names.iter().any(|known| known == name) {
            names.push(name.to_owned());
        }
    }
    names
}

/// Renders the table for the protocol's documentation.
#[cfg(any(test, feature = "fakes"))]
pub fn markdown_table() -> String {
    use super::call::{Access, FdPassing, Key, OnDisconnect};
    let mut out = String::from(
        "| method | who may call it | key | if the caller disconnects | descriptors |\n|---|---|---|---|---|\n",
    );
    for call in calls() {
        let access = match call.access {
            Access::Anybody => "anybody",
            Access::Owner => "owner",
            Access::Privileged => "privileged",
        };
        let key = if call.key == Key::Keyed { "yes" } else { "" };
        let on_disconnect = match call.on_disconnect {
            OnDisconnect::Nothing => "",
            OnDisconnect::EndCall => "the call ends",
            OnDisconnect::CancelOperation => "the operation is cancelled",
            OnDisconnect::FinishOperation => "the operation continues",
        };
        let fds = match call.fds {
            FdPassing::NoFds => "",
            FdPassing::TakesFds => "with the request",
            FdPassing::ReturnsFd => "with the reply",
        };
        out += &format!(
            "| `{}` | {access} | {key} | {on_disconnect} | {fds} |\n",
            call.method
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn each_method_is_in_the_table_once() {
        let methods: BTreeSet<&str> = calls().map(|call| call.method).collect();
        assert_eq!(methods.len(), calls().count());
        for method in methods {
            assert!(
                AnyCall::parse(method, "1").is_some_and(|parsed| parsed.is_err()),
                "{method}"
            );
        }
        assert!(find("vm.nothing").is_none() && AnyCall::parse("vm.nothing", "{}").is_none());
    }

    /// Without a key, a retry could run an operation twice.
    #[test]
    fn every_operation_takes_a_key() {
        let unkeyed = calls().filter(|call| {
            call.on_disconnect.is_operation() && call.key == crate::api::call::Key::Unkeyed
        });
        assert_eq!(unkeyed.map(|call| call.method).collect::<Vec<_>>(), [""; 0]);
    }

    #[test]
    fn features_are_listed_once() {
        let expected = [
            "vsock",
            "ports",
            "exec",
            "workspace",
            "snapshots",
            "image_build",
            "image_pull",
            "image_commit",
            "image_register",
            "image_export",
            "kernels",
            "events",
        ];
        assert_eq!(features(), expected);
    }
}
