// A day at the front desk, by a Node client that has nothing but the protos and the service config.
//
//   node day.mjs HOST:PORT PROTOS SERVICE_CONFIG
//
// Prints what it saw as one line of JSON.

import { readFileSync } from "node:fs";
import { promisify } from "node:util";
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";
import protobuf from "protobufjs";

const [target, protos, serviceConfig] = process.argv.slice(2);

const files = ["appointment", "clinic", "doctor", "error_reason", "patient", "queue", "rules", "slot"];
const definition = protoLoader.loadSync(
  files.map((name) => `clinic/frontdesk/v1/${name}.proto`),
  { includeDirs: [protos], longs: String, enums: String, defaults: true, oneofs: true },
);
const api = grpc.loadPackageDefinition(definition).clinic.frontdesk.v1;

// google.rpc's details of a refusal.
const { root } = protobuf.parse(`
  syntax = "proto3";
  package google.rpc;
  message Any { string type_url = 1; bytes value = 2; }
  message Status { int32 code = 1; string message = 2; repeated Any details = 3; }
  message ErrorInfo { string reason = 1; string domain = 2; map<string, string> metadata = 3; }
`);
const Status = root.lookupType("google.rpc.Status");
const ErrorInfo = root.lookupType("google.rpc.ErrorInfo");

const services = {};
function service(name) {
  services[name] ??= new api[name](target, grpc.credentials.createInsecure(), {
    "grpc.service_config": readFileSync(serviceConfig, "utf8"),
    "grpc.enable_http_proxy": 0,
  });
  return services[name];
}

function call(name, method, request) {
  const stub = service(name);
  return promisify(stub[method]).call(stub, request);
}

async function refusal(promise) {
  try {
    await promise;
  } catch (error) {
    const status = Status.decode(error.metadata.get("grpc-status-details-bin")[0]);
    const packed = status.details.find((detail) => detail.typeUrl.endsWith("/google.rpc.ErrorInfo"));
    const info = ErrorInfo.toObject(ErrorInfo.decode(packed.value));
    return { code: grpc.status[error.code], text: error.details, ...info };
  }
  throw new Error("not refused");
}

const { clinic } = await call("ClinicService", "CreateClinic", {
  clinic: { name: "Norte", timeZone: "America/Sao_Paulo" },
});
const { doctor } = await call("DoctorService", "CreateDoctor", {
  doctor: { code: "NODE", displayName: "Dr. Node", clinicId: clinic.id },
});
const { patient } = await call("PatientService", "RegisterPatient", {
  patient: { givenName: "Lia", familyName: "Łukasz", phone: "(11) 98765-4321" },
  defaultCountry: "BR",
});
const { queue: begun } = await call("QueueService", "GetQueue", { doctorId: doctor.id });

const watched = [];
const watch = service("QueueService").WatchQueue({ doctorId: doctor.id });
const ended = new Promise((resolve, reject) => {
  watch.on("data", (message) => {
    watched.push(message);
    if (message.update?.changes.some((change) => change.kind === "KIND_COMPLETED")) {
      watch.cancel();
    }
  });
  watch.on("error", (error) => (error.code === grpc.status.CANCELLED ? resolve() : reject(error)));
  watch.on("end", resolve);
});
await new Promise((resolve) => watch.once("data", resolve));

const booking = {
  patientId: patient.id,
  doctorDay: { doctorId: doctor.id, date: begun.date },
  reason: "cough",
  idempotencyKey: "node-1",
};
const booked = await call("AppointmentService", "BookAppointment", booking);
const again = await call("AppointmentService", "BookAppointment", booking);
const appointmentId = booked.appointment.id;
const duplicate = await refusal(
  call("AppointmentService", "BookAppointment", { ...booking, idempotencyKey: "node-2" }),
);
const invalid = await refusal(call("PatientService", "RegisterPatient", { patient: { givenName: "a\u0000b" } }));
const arrived = await call("QueueService", "CheckIn", { appointmentId });
const called = await call("QueueService", "CallNext", { doctorId: doctor.id, room: "2" });
const started = await call("AppointmentService", "StartAppointment", { appointmentId });
const completed = await call("AppointmentService", "CompleteAppointment", { appointmentId });
const empty = await refusal(call("QueueService", "CallNext", { doctorId: doctor.id }));
await ended;

console.log(
  JSON.stringify({
    patient,
    doctor,
    booked,
    again,
    duplicate,
    invalid,
    arrived,
    called,
    started,
    completed,
    empty,
    watched,
    reasons: api.ErrorReason.type.value.map((value) => value.name),
  }),
);
for (const stub of Object.values(services)) {
  stub.close();
}
