#!/usr/bin/python3
"""A guest's SSH server that attacks its client.

usage: hostile_sshd.py HOST_KEY_FILE MODE
Prints its port on the loopback. Accepts every key and starts every command. Then it sends messages
without end. MODE chooses the messages:
  success   CHANNEL_SUCCESS without a request
  unknown   messages of an unknown type
  rekey     repeated key exchanges
  kexflood  unknown messages inside a key exchange
  global    global requests that need a reply
  open      channels that the server opens
  reqs      channel requests that need a reply
  exitsig   repeated exit-signal requests
  drip      one meaningless message per second
Environment: PAD, the number of bytes in a message; REKEY, the number of bytes between two key
exchanges that the server starts.
"""
import os
import socket
import struct
import sys
import threading
import time

import paramiko

host_key = paramiko.Ed25519Key(filename=sys.argv[1])
mode = sys.argv[2]
pad = b"x" * int(os.environ.get("PAD", "8000"))


class Server(paramiko.ServerInterface):
    def check_auth_publickey(self, username, key):
        return paramiko.AUTH_SUCCESSFUL

    def get_allowed_auths(self, username):
        return "publickey"

    def check_channel_request(self, kind, chanid):
        return paramiko.OPEN_SUCCEEDED

    def check_channel_exec_request(self, channel, command):
        threading.Thread(target=flood, args=(channel,), daemon=True).start()
        return True


def string(data):
    return struct.pack(">I", len(data)) + data


def message(kind, *parts):
    m = paramiko.Message()
    m.add_byte(bytes([kind]))
    for part in parts:
        m.add_int(part) if isinstance(part, int) else m.add_bytes(part)
    return m


def flood(channel):
    # Lets the reply to the exec request go first.
    time.sleep(0.2)
    transport, to, sent = channel.transport, channel.remote_chanid, 0
    try:
        while True:
            if mode == "success":
                m = message(99, to, pad)
            elif mode == "rekey":
                m = message(2, string(b"abcd"))
                if sent % 50 == 20:
                    transport.renegotiate_keys()
            elif mode == "kexflood":
                if sent == 0:
                    transport._send_kex_init()
                m = message(200, b"y" * 100)
            elif mode == "unknown":
                m = message(200, pad)
            elif mode == "global":
                m = message(80, string(b"abcd"), b"\x01", pad)
            elif mode == "drip":
                time.sleep(1)
                m = message(2, string(b"x"))
            elif mode == "open":
                m = message(90, string(b"session"), 1, 1000, 1000, pad)
            elif mode == "reqs":
                m = message(98, to, string(b"abcde"), b"\x01", pad)
            elif mode == "exitsig":
                m = message(98, to, string(b"exit-signal"), b"\x00", string(b"HUP"), b"\x00", string(pad), string(b""))
            else:
                sys.exit("unknown mode " + mode)
            transport._send_message(m)
            sent += 1
    except Exception:
        # The client has disconnected.
        pass


listener = socket.socket()
listener.bind(("127.0.0.1", 0))
listener.listen(64)
print(listener.getsockname()[1], flush=True)
while True:
    connection, _ = listener.accept()
    transport = paramiko.Transport(connection)
    if "REKEY" in os.environ:
        transport.packetizer.REKEY_BYTES = int(os.environ["REKEY"])
    transport.add_server_key(host_key)
    try:
        transport.start_server(server=Server())
    except Exception:
        pass
