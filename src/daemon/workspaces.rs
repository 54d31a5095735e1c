//! Imports and exports. The VM's lock is held for a moment to join its cancel set; the workspace lock is held
//! across the guest I/O, on the operation's own thread; a pool worker pumps.
