//! Workspaces: packing, unpacking, the guest-side scripts.
