package main

import (
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
)

// The CNI protocol's frame (CNI spec 1.1.0, section 2), instead of package skel
// of containernetworking/cni: that reads the configuration twice more, compiles
// three regular expressions at start, and opens the pod's network namespace and
// its own after the verb has run. It is a tenth of the time of each pod, those
// without a policy included, which are not to have anything opened for them.

// specVersions are the versions of the CNI spec that the plugin speaks, ascending.
var specVersions = []string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"}

// A verb is one value of CNI_COMMAND.
type verb struct {
	since string   // the spec version that has it
	needs []string // environment variables that must not be empty
	run   func(*call) error
}

// A call is one run of the plugin: its environment and its configuration.
type call struct {
	*config
	netns string
	pod   podArgs
}

func verbs() map[string]verb {
	return map[string]verb{
		"ADD":    {"0.3.1", []string{"CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"}, add},
		"CHECK":  {"0.4.0", []string{"CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"}, check},
		"DEL":    {"0.3.1", []string{"CNI_CONTAINERID", "CNI_IFNAME", "CNI_PATH"}, del},
		"GC":     {"1.1.0", []string{"CNI_PATH"}, func(*call) error { return nil }}, // the rules die with the namespace: nothing is kept elsewhere
		"STATUS": {"1.1.0", []string{"CNI_PATH"}, func(*call) error { return nil }}, // an error would make the node NotReady for every pod
	}
}

// runCNI is the plugin: one verb, its result or its error as JSON on stdout.
func runCNI() int {
	err := asCNIError(dispatch(os.Getenv("CNI_COMMAND")))
	if err == nil {
		return exitOK
	}
	if printErr := err.Print(); printErr != nil {
		slog.Error("writing the CNI error to stdout", "error", printErr)
	}
	return exitFailed
}

func dispatch(command string) error {
	if command == "VERSION" {
		return printJSON(map[string]any{"cniVersion": specVersions[len(specVersions)-1], "supportedVersions": specVersions})
	}
	v, ok := verbs()[command]
	if !ok {
		return types.NewError(types.ErrInvalidEnvironmentVariables, fmt.Sprintf("unknown CNI_COMMAND: %s", command), "")
	}
	if err := checkEnvironment(v.needs); err != nil {
		return err
	}
	stdin, err := io.ReadAll(os.Stdin)
	if err != nil {
		return types.NewError(types.ErrIOFailure, fmt.Sprintf("reading the network configuration from stdin: %v", err), "")
	}
	c, err := parseConfig(stdin)
	if err != nil {
		return types.NewError(types.ErrDecodingFailure, err.Error(), "")
	}
	if err := c.checkFrame(command, v); err != nil {
		return err
	}
	pod := parsePodArgs(os.Getenv("CNI_ARGS"))
	pod.ContainerID, pod.NetNS, pod.IfName = os.Getenv("CNI_CONTAINERID"), os.Getenv("CNI_NETNS"), os.Getenv("CNI_IFNAME")
	return v.run(&call{c, pod.NetNS, pod})
}

func checkEnvironment(needs []string) error {
	invalid := func(format string, args ...any) error {
		return types.NewError(types.ErrInvalidEnvironmentVariables, fmt.Sprintf(format, args...), "")
	}
	missing := slices.DeleteFunc(slices.Clone(needs), func(name string) bool { return os.Getenv(name) != "" })
	if len(missing) > 0 {
		return invalid("required env variables [%s] missing", strings.Join(missing, ","))
	}
	if !slices.Contains(needs, "CNI_CONTAINERID") {
		return nil
	}
	if id := os.Getenv("CNI_CONTAINERID"); !isName(id) {
		return invalid("CNI_CONTAINERID: %.80q: want letters, digits, and behind the first also _ . -", id)
	}
	name := os.Getenv("CNI_IFNAME")
	if len(name) > 15 || name == "." || name == ".." || strings.ContainsAny(name, "/: \t\n\v\f\r") {
		return invalid("CNI_IFNAME: %.80q: want the name of an interface, of at most 15 characters", name)
	}
	return nil
}

// isName reports whether s is an identifier by the spec: alphanumeric, then any
// of alphanumeric, underscore, dot and hyphen.
func isName(s string) bool {
	for i, r := range []byte(s) {
		alnum := '0' <= r && r <= '9' || 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z'
		if !alnum && (i == 0 || r != '_' && r != '.' && r != '-') {
			return false
		}
	}
	return s != ""
}

// checkFrame checks what the spec asks of every configuration.
func (c *config) checkFrame(command string, v verb) error {
	if w := c.wrongType; w != nil && (w.Field == "" || w.Field == "name" || w.Field == "cniVersion") {
		return types.NewError(types.ErrDecodingFailure, fmt.Sprintf("network configuration: %v", w), "")
	}
	if !isName(c.Name) {
		return types.NewError(types.ErrInvalidNetworkConfig, fmt.Sprintf("network configuration: name: %.80q: want letters, digits, and behind the first also _ . -", c.Name), "")
	}
	at := slices.Index(specVersions, c.CNIVersion)
	if at < 0 {
		return types.NewError(types.ErrIncompatibleCNIVersion, "incompatible CNI versions", fmt.Sprintf("config is %q, plugin supports %q", c.CNIVersion, specVersions))
	}
	if at < slices.Index(specVersions, v.since) {
		return types.NewError(types.ErrIncompatibleCNIVersion, fmt.Sprintf("config version does not allow %s", command), fmt.Sprintf("config is %q, %s needs %q", c.CNIVersion, command, v.since))
	}
	return nil
}

func printJSON(v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return types.NewError(types.ErrInternal, err.Error(), "")
	}
	return printResult(b)
}

func printResult(b []byte) error {
	if _, err := os.Stdout.Write(append(b, '\n')); err != nil {
		return types.NewError(types.ErrIOFailure, fmt.Sprintf("writing the result to stdout: %v", err), "")
	}
	return nil
}
