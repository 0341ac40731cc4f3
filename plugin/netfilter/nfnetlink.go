package netfilter

import (
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"

	"github.com/mdlayher/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// nfnetlink, as little of it as one transaction needs: a blocking socket, one
// sendmsg for the whole batch, one acknowledgement for all of it.
//
// Not the connection of google/nftables: that asks for an echo and an
// acknowledgement of every message and receives each through the Go runtime's
// poller, which takes two further threads and two hundred system calls per pod:
// half of the time of an ADD. Its expressions, data types and comments are used.

// An nfConn is a netlink socket of the netfilter family in one network namespace.
type nfConn struct {
	fd  int
	seq uint32
}

// ackTimeout bounds the wait for the kernel's answer, which it sends before
// sendmsg returns.
var ackTimeout = unix.Timeval{Sec: 10}

func dialNF(ns int) (*nfConn, error) {
	fd, err := socketIn(ns, func() (int, error) {
		return unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	})
	if errors.Is(err, unix.EPROTONOSUPPORT) {
		return nil, &Unsupported{What: "nftables: the kernel has no netlink for netfilter", Need: "Linux 3.13 with CONFIG_NF_TABLES", Err: err}
	}
	if err != nil {
		return nil, fmt.Errorf("opening a netfilter socket in the pod's network namespace: %w", err)
	}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &ackTimeout); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("netfilter socket: %w", err)
	}
	return &nfConn{fd: fd}, nil
}

func (c *nfConn) close() { unix.Close(c.fd) }

// socketIn runs open on a thread that is in the namespace, and brings the
// thread back. A thread that cannot be brought back is given up.
func socketIn(ns int, open func() (int, error)) (int, error) {
	if ns == CurrentNetNS {
		return open()
	}
	runtime.LockOSThread()
	home, err := netns.Get()
	if err != nil {
		runtime.UnlockOSThread()
		return -1, fmt.Errorf("opening the thread's own network namespace: %w", err)
	}
	defer home.Close()
	if err := netns.Set(netns.NsHandle(ns)); err != nil {
		runtime.UnlockOSThread()
		return -1, fmt.Errorf("entering the pod's network namespace: %w", err)
	}
	fd, err := open()
	if back := netns.Set(home); back != nil {
		if err == nil {
			unix.Close(fd)
		}
		return -1, fmt.Errorf("leaving the pod's network namespace: %w", back) // the thread stays locked, and ends with its goroutine
	}
	runtime.UnlockOSThread()
	return fd, err
}

// A message is one netlink message of a batch in the making.
type message struct{ b []byte }

const (
	nlHeaderLen = 16 // struct nlmsghdr
	nfHeaderLen = 4  // struct nfgenmsg
)

// attr appends an attribute; netlink aligns each to four bytes.
func (m *message) attr(typ uint16, data []byte) {
	m.b = binary.NativeEndian.AppendUint16(m.b, uint16(4+len(data)))
	m.b = binary.NativeEndian.AppendUint16(m.b, typ)
	m.b = append(m.b, data...)
	m.align()
}

func (m *message) align() {
	for len(m.b)%4 != 0 {
		m.b = append(m.b, 0)
	}
}

func (m *message) str(typ uint16, s string) { m.attr(typ, append([]byte(s), 0)) }
func (m *message) u32(typ uint16, n uint32) { m.attr(typ, binary.BigEndian.AppendUint32(nil, n)) }

// nest appends an attribute that holds those which f appends.
func (m *message) nest(typ uint16, f func()) {
	at := m.open(typ)
	f()
	m.shut(at)
}

func (m *message) open(typ uint16) (at int) {
	at = len(m.b)
	m.attr(typ|unix.NLA_F_NESTED, nil)
	return at
}

func (m *message) shut(at int) { binary.NativeEndian.PutUint16(m.b[at:], uint16(len(m.b)-at)) }

// A batch is a transaction: all of its messages or none.
type batch struct {
	message
	seq   uint32
	what  []phrase // what each message does, for errors
	first uint32
}

func (c *nfConn) newBatch() *batch {
	b := &batch{seq: c.seq, message: message{make([]byte, 0, 8192)}}
	b.begin(unix.NFNL_MSG_BATCH_BEGIN, 0, unix.NFNL_SUBSYS_NFTABLES, unix.NFPROTO_UNSPEC, func() {})
	b.first = b.seq
	return b
}

func (b *batch) begin(typ, flags uint16, resID uint16, family byte, f func()) {
	b.seq++
	at := len(b.b)
	b.b = binary.NativeEndian.AppendUint32(b.b, 0)
	b.b = binary.NativeEndian.AppendUint16(b.b, typ)
	b.b = binary.NativeEndian.AppendUint16(b.b, unix.NLM_F_REQUEST|flags)
	b.b = binary.NativeEndian.AppendUint32(b.b, b.seq)
	b.b = binary.NativeEndian.AppendUint32(b.b, 0)
	b.b = append(b.b, family, unix.NFNETLINK_V0)
	b.b = binary.BigEndian.AppendUint16(b.b, resID)
	f()
	binary.NativeEndian.PutUint32(b.b[at:], uint32(len(b.b)-at))
}

// nft appends one nf_tables message of family inet; what names it in errors.
func (b *batch) nft(msg, flags uint16, what phrase, f func()) {
	b.what = append(b.what, what)
	b.begin(unix.NFNL_SUBSYS_NFTABLES<<8|msg, flags, 0, unix.NFPROTO_INET, f)
}

// A batchError is what the kernel said of one message of a batch.
type batchError struct {
	what string
	err  unix.Errno
}

func (e *batchError) Error() string { return e.what + ": " + e.err.Error() }
func (e *batchError) Unwrap() error { return e.err }

// commit sends the batch and returns the first error in it.
func (c *nfConn) commit(b *batch) error {
	// The last message alone asks for an acknowledgement: errors come unasked.
	last := b.seq
	b.ackLast()
	b.begin(unix.NFNL_MSG_BATCH_END, 0, unix.NFNL_SUBSYS_NFTABLES, unix.NFPROTO_UNSPEC, func() {})
	c.seq = b.seq
	if err := c.send(b.b); err != nil {
		return err
	}
	var first error
	for {
		msgs, err := c.receive()
		if err != nil {
			return err
		}
		for _, m := range msgs {
			if m.Header.Type != netlink.Error || len(m.Data) < 4 {
				continue
			}
			seq, errno := m.Header.Sequence, unix.Errno(-int32(binary.NativeEndian.Uint32(m.Data)))
			if seq < b.first || seq > last {
				continue // of an earlier batch on this socket
			}
			if errno != 0 && first == nil {
				e := &batchError{"the transaction", errno}
				if i := int(seq - b.first - 1); i >= 0 && i < len(b.what) {
					e.what = fmt.Sprintf(b.what[i].format, b.what[i].args...)
				}
				first = e
			}
			// The kernel refuses or aborts a batch as a whole under the number of
			// its beginning, and says no more.
			if seq == last || seq == b.first && errno != 0 {
				return first
			}
		}
	}
}

func (b *batch) ackLast() {
	for at := 0; at < len(b.b); {
		size := int(binary.NativeEndian.Uint32(b.b[at:]))
		if at+size == len(b.b) {
			flags := binary.NativeEndian.Uint16(b.b[at+6:])
			binary.NativeEndian.PutUint16(b.b[at+6:], flags|unix.NLM_F_ACK)
		}
		at += size
	}
}

func (c *nfConn) send(b []byte) error {
	err := unix.Sendto(c.fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	if errors.Is(err, unix.EMSGSIZE) || errors.Is(err, unix.ENOBUFS) {
		// A batch is one message to the socket: it has to fit the send buffer.
		// FORCE needs CAP_NET_ADMIN in the initial user namespace; without, the
		// limit net.core.wmem_max stays.
		if unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 2*len(b)) != nil {
			_ = unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 2*len(b))
		}
		err = unix.Sendto(c.fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	}
	if err != nil {
		return fmt.Errorf("sending %d bytes to netfilter: %w", len(b), err)
	}
	return nil
}

func (c *nfConn) receive() ([]netlink.Message, error) {
	buf := make([]byte, 32<<10) // the kernel fills at most this much at once
	n, _, err := unix.Recvfrom(c.fd, buf, unix.MSG_TRUNC)
	for errors.Is(err, unix.EINTR) {
		n, _, err = unix.Recvfrom(c.fd, buf, unix.MSG_TRUNC)
	}
	if err == nil && n > len(buf) {
		err = unix.EMSGSIZE
	}
	if err != nil {
		return nil, fmt.Errorf("receiving from netfilter: %w", err)
	}
	var msgs []netlink.Message
	for b := buf[:n]; len(b) >= nlHeaderLen; {
		size := int(binary.NativeEndian.Uint32(b))
		if size < nlHeaderLen || size > len(b) {
			return nil, errors.New("receiving from netfilter: a message of no sound length")
		}
		msgs = append(msgs, netlink.Message{
			Header: netlink.Header{
				Length:   uint32(size),
				Type:     netlink.HeaderType(binary.NativeEndian.Uint16(b[4:])),
				Flags:    netlink.HeaderFlags(binary.NativeEndian.Uint16(b[6:])),
				Sequence: binary.NativeEndian.Uint32(b[8:]),
			},
			Data: b[nlHeaderLen:size],
		})
		b = b[min(len(b), (size+3)&^3):]
	}
	return msgs, nil
}

// request asks for objects: all that match, or one. An object that is not there
// is ENOENT.
func (c *nfConn) request(msg uint16, dump bool, f func(m *message)) ([][]netlink.Attribute, error) {
	return c.requestFamily(unix.NFPROTO_INET, msg, dump, f)
}

func (c *nfConn) requestFamily(family byte, msg uint16, dump bool, f func(m *message)) (out [][]netlink.Attribute, err error) {
	// A dump that others' changes cut short is to be asked for again.
	for range 10 {
		if out, err = c.ask(family, msg, dump, f); !errors.Is(err, errDumpInterrupted) {
			break
		}
	}
	return out, err
}

var errDumpInterrupted = errors.New("the rules change faster than they can be read")

func (c *nfConn) ask(family byte, msg uint16, dump bool, f func(m *message)) ([][]netlink.Attribute, error) {
	flags := uint16(unix.NLM_F_ACK)
	if dump {
		flags = unix.NLM_F_DUMP
	}
	b := &batch{seq: c.seq}
	b.begin(unix.NFNL_SUBSYS_NFTABLES<<8|msg, flags, 0, family, func() { f(&b.message) })
	c.seq = b.seq
	if err := c.send(b.b); err != nil {
		return nil, err
	}
	var out [][]netlink.Attribute
	interrupted := false
	for {
		msgs, err := c.receive()
		if err != nil {
			return nil, err
		}
		for _, m := range msgs {
			if m.Header.Sequence != b.seq {
				continue
			}
			interrupted = interrupted || m.Header.Flags&unix.NLM_F_DUMP_INTR != 0
			switch {
			case m.Header.Type == netlink.Done && interrupted:
				return nil, errDumpInterrupted
			case m.Header.Type == netlink.Done:
				return out, nil
			case m.Header.Type == netlink.Error:
				if errno := unix.Errno(-int32(binary.NativeEndian.Uint32(m.Data))); errno != 0 {
					return nil, errno
				}
				return out, nil
			case len(m.Data) >= nfHeaderLen:
				out = append(out, attributes(m.Data[nfHeaderLen:]))
			}
		}
	}
}
